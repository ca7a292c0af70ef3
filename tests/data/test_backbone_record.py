import numpy as np
import pytest

from modeling_diffusionvmr import DiffusionVMRConfig, open_features
from modeling_diffusionvmr.data.backbone_record import describe_backbones
from modeling_diffusionvmr.data.features import METADATA_FILE, TEXT_KEY, VIDEO_KEY, write_features
from modeling_diffusionvmr.data.files import save_json

KNOWN = [
    {"name": "slowfast", "feature_size": 6, "clip_seconds": 2.0},
    {"name": "clip", "id": "openai/clip", "feature_size": 4, "text_feature_size": 3, "clip_seconds": 2.0},
]


@pytest.fixture
def store(tmp_path):
    """Return a function that writes a folder of features and opens it."""

    def make(name: str, size: int, key: str = VIDEO_KEY, **metadata):
        write_features(tmp_path / name, "a", np.ones((5, size), np.float32), key)
        if metadata:
            save_json(metadata, tmp_path / name / METADATA_FILE)
        return open_features(tmp_path / name)

    return make


def check(video, text, expected, sources=None, **options):
    """Check the descriptions, and that a configuration accepts them."""
    sizes = [store["a"].shape[1] for store in video]
    text_size = text["a"].shape[1]
    found, found_sources = describe_backbones(video, text, sizes, text_size, **options)
    assert (found, found_sources) == (expected, sources or {})
    DiffusionVMRConfig(backbones=found, video_feature_size=sum(sizes), text_feature_size=text_size)


def test_features_of_a_local_folder(store, tmp_path):
    (tmp_path / "my clip").mkdir()
    backbone = str(tmp_path / "my clip")
    entry = {"name": "my_clip", "folder": "my_clip", "feature_size": 4, "clip_seconds": 1.5, "text_feature_size": 3}
    text = store("t", 3, TEXT_KEY, backbone=backbone)
    sources = {"my_clip": backbone}
    check([store("v", 4, backbone=backbone, clip_seconds=1.5)], text, [entry], sources)
    check([store("v", 4, backbone=backbone + "/")], text, [{**entry, "clip_seconds": 2.0}], sources, clip_seconds=2.0)


@pytest.mark.parametrize("name", ["checkpoint-500", "last-checkpoint"])
def test_backbone_in_a_folder_that_a_training_wrote(store, tmp_path, name):
    """Under that name, it would be saved into the checkpoint of a training."""
    (tmp_path / name).mkdir()
    backbone, kept = str(tmp_path / name), f"backbone-{name}"
    entry = {"name": kept, "folder": kept, "feature_size": 4, "clip_seconds": 2.0, "text_feature_size": 3}
    video, text = store("v", 4, backbone=backbone, clip_seconds=2.0), store("t", 3, TEXT_KEY, backbone=backbone)
    check([video], text, [entry], {kept: backbone})


def test_features_of_the_hub(store):
    video = [
        store("a", 4, backbone="user/clip", clip_seconds=2.0),
        store("b", 6, backbone="other/clip", clip_seconds=2.0),
    ]
    expected = [
        {"name": "clip", "id": "user/clip", "feature_size": 4, "clip_seconds": 2.0},
        {"name": "clip_2", "id": "other/clip", "feature_size": 6, "clip_seconds": 2.0, "text_feature_size": 3},
    ]
    check(video, store("t", 3, TEXT_KEY, backbone="other/clip"), expected)


def test_features_without_a_record(store):
    video, text = [store("slow", 6), store("clip features", 4)], store("words", 3, TEXT_KEY)
    assert describe_backbones(video, text, [6, 4], 3, known=KNOWN) == (KNOWN, {})
    unknown = [
        {"name": "slow", "feature_size": 6},
        {"name": "clip_features", "feature_size": 4},
        {"name": "words", "text_feature_size": 3},
    ]
    check(video, text, unknown)
    # Of the known ones, only the sizes of the text agree
    known_text = {"name": "clip", "id": "openai/clip", "text_feature_size": 3}
    check(video[::-1], text, [unknown[1], unknown[0], known_text], known=KNOWN)
    twice = [
        {"name": "f", "feature_size": 5, "clip_seconds": 3.0},
        {"name": "f_2", "feature_size": 5, "clip_seconds": 3.0},
    ]
    nameless = {"name": "the_given_mapping", "text_feature_size": 2}
    check([store("x/f", 5), store("y/f", 5)], {"a": np.ones((1, 2))}, [*twice, nameless], clip_seconds=3.0)


def test_record_wins_over_what_is_known(store):
    video = [store("slow", 6), store("clip", 4, backbone="user/other", clip_seconds=2.0)]
    expected = [
        {"name": "slowfast", "feature_size": 6, "clip_seconds": 2.0},
        {"name": "other", "id": "user/other", "feature_size": 4, "clip_seconds": 2.0},
        {"name": "clip", "id": "openai/clip", "text_feature_size": 3},
    ]
    check(video, store("t", 3, TEXT_KEY), expected, known=KNOWN, clip_seconds=2.0)


def test_backbone_that_is_not_here(store):
    video = [store("v", 4, backbone="/gone/clip", clip_seconds=2.0)]
    with pytest.warns(UserWarning, match="v: computed by /gone/clip, which is not here"):
        check(
            video,
            {"a": np.ones((1, 3))},
            [
                {"name": "clip", "feature_size": 4, "clip_seconds": 2.0},
                {"name": "the_given_mapping", "text_feature_size": 3},
            ],
        )


def test_backbone_of_another_machine_may_be_that_of_the_model(store):
    """Features are extracted on one machine and trained on with the same checkpoint on another one."""
    known = [{"name": "clip", "folder": "clip", "feature_size": 4, "text_feature_size": 3, "clip_seconds": 2.0}]
    gone = {"backbone": "/home/somebody/model/clip"}
    video, text = [store("v", 4, clip_seconds=2.0, **gone)], store("t", 3, TEXT_KEY, **gone)
    with pytest.warns(UserWarning, match="which is not here, assuming backbone `clip` of the model or preset"):
        check(video, text, known, known=known)
    other = [{**known[0], "name": "other"}]
    with pytest.warns(UserWarning, match="which is not here, so the model will not run on videos"):
        check(video, text, [{key: value for key, value in known[0].items() if key != "folder"}], known=other)


def test_record_that_is_not_text(store):
    with pytest.raises(ValueError, match="v: `backbone` must be the folder or Hub id of a backbone, got 3"):
        store("v", 4, backbone=3)
