import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertConfig

from modeling_diffusionvmr.backbones import Backbones, load_backbone
from modeling_diffusionvmr.dual_encoders import ClipBackbone
from modeling_diffusionvmr.video import open_video
from small_checkpoint import as_video, description, put_on_hub, tiny_clip
from test_video import write_video


@pytest.fixture(scope="module")
def clip() -> ClipBackbone:
    return tiny_clip()


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 24, 40, 3), dtype=np.uint8)


@pytest.mark.parametrize("height", [24, 3])  # three rows are not three color channels
def test_video_features_are_projected_embeddings(clip, frames, height):
    frames = frames[:, :height]
    features = clip.encode_video(as_video(frames), batch_size=3)
    assert features.shape == (7, 12) == (len(frames), clip.feature_size)
    assert features.dtype == np.float32
    mean, std = np.array(clip.image_processor.image_mean), np.array(clip.image_processor.image_std)
    for frame, feature in zip(frames, features):
        # CLIP's own transform: shortest side to 16, bicubic by Pillow, the middle, normalized
        width = 16 * 40 // height
        left = (width - 16) // 2
        middle = Image.fromarray(frame).resize((width, 16), Image.Resampling.BICUBIC).crop((left, 0, left + 16, 16))
        pixels = torch.tensor((np.asarray(middle) / 255 - mean) / std, dtype=torch.float32).permute(2, 0, 1)[None]
        pooled = clip.model.vision_model(pixel_values=pixels).pooler_output
        wanted = clip.model.visual_projection(pooled)[0].detach().numpy()
        np.testing.assert_allclose(feature, wanted, atol=1e-5)


def test_text_features_are_hidden_states_of_all_tokens(clip):
    sentences = ["a red dog runs", "dog", "A  RED dog runs"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        features = clip.encode_text(sentences)
    assert [array.shape for array in features] == [(6, 8), (3, 8), (6, 8)]
    assert all(array.dtype == np.float32 for array in features)
    np.testing.assert_array_equal(features[0], features[2])
    tokens = ["<|startoftext|>", "a</w>", "red</w>", "dog</w>", "runs</w>", "<|endoftext|>"]
    ids = torch.tensor([clip.tokenizer.convert_tokens_to_ids(tokens)])
    wanted = clip.model.text_model(input_ids=ids).last_hidden_state[0].detach().numpy()
    np.testing.assert_allclose(features[0], wanted, atol=1e-6)


def test_long_sentence_keeps_its_end_token(clip):
    sentence = "a red dog runs " * 5
    with pytest.warns(UserWarning, match="truncated from 22 tokens to 10"):
        (features,) = clip.encode_text([sentence])
    with pytest.warns(UserWarning, match="truncated from 22 tokens to 5"):
        (cut,) = clip.encode_text([sentence], max_tokens=5)
    assert features.shape == (10, 8)
    np.testing.assert_allclose(cut, clip.encode_text(["a red dog"])[0], atol=1e-6)


@pytest.mark.parametrize("limit", [2, 3, 5, 8, 9, 10])
@pytest.mark.parametrize("sentence", ["a red dog runs " * 5, "a red dog runs fast a red dog", "dog"])
@pytest.mark.filterwarnings("ignore:query truncated")
def test_truncation_keeps_the_ids_that_the_tokenizer_keeps(clip, monkeypatch, sentence, limit):
    seen, text_model = [], clip.model.text_model.forward
    monkeypatch.setattr(
        clip.model.text_model, "forward", lambda input_ids: seen.append(input_ids.tolist()) or text_model(input_ids)
    )
    clip.encode_text([sentence], limit)
    assert seen == [[tiny_clip().tokenizer(sentence, truncation=True, max_length=limit)["input_ids"]]]


@pytest.mark.filterwarnings("ignore:query truncated")
def test_encoding_text_changes_no_shared_state(tmp_path):
    clip = tiny_clip()
    sentences = ["a red dog runs " * 5, "dog", "a red dog runs fast"]
    clip.save_pretrained(tmp_path / "before")
    expected = clip.encode_text(sentences, 5)

    def encode(index):
        return [clip.encode_text(sentences[::step], limit) for step in (1, -1) for limit in (5, 10)]

    with ThreadPoolExecutor(8) as pool:
        for short, full, short_reversed, full_reversed in pool.map(encode, range(80)):
            assert [len(array) for array in short] == [5, 3, 5] and [len(array) for array in full] == [10, 3, 7]
            for arrays in (short, short_reversed[::-1]):
                for array, wanted in zip(arrays, expected):
                    np.testing.assert_allclose(array, wanted, atol=1e-6)
            assert [len(array) for array in full_reversed] == [7, 3, 10]
    clip.save_pretrained(tmp_path / "after")
    before, after = (tmp_path / name / "tokenizer.json" for name in ("before", "after"))
    assert before.read_bytes() == after.read_bytes()


@pytest.mark.filterwarnings("ignore:query truncated")
def test_truncation_and_padding_of_a_loaded_tokenizer_are_turned_off(clip):
    other = tiny_clip()
    other.tokenizer(["a red dog", "dog"], truncation=True, max_length=4, padding="max_length")
    assert other.tokenizer.backend_tokenizer.truncation and other.tokenizer.backend_tokenizer.padding
    loaded = ClipBackbone(other.model, other.image_processor, other.tokenizer)
    backend = loaded.tokenizer.backend_tokenizer
    assert backend.truncation is None and backend.padding is None
    for sentence in ("dog", "a red dog runs " * 5):
        np.testing.assert_array_equal(loaded.encode_text([sentence])[0], clip.encode_text([sentence])[0])


@pytest.mark.parametrize("sentence", ["", " \n", None, b"a dog", "a \ud83d dog"])
def test_invalid_sentence(clip, sentence):
    with pytest.raises(ValueError, match="^a query (must be a string that is not blank|cannot be encoded)"):
        clip.encode_text(["a dog", sentence])


def test_frozen_and_movable(clip, frames):
    assert not clip.model.training
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())
    half = tiny_clip().to("cpu", torch.bfloat16)
    assert half.model.dtype == torch.bfloat16
    features = half.encode_video(as_video(frames))
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, clip.encode_video(as_video(frames)), atol=0.1)
    assert half.encode_text(["a dog"])[0].dtype == np.float32


def test_one_pass_for_all_backbones(clip, frames, monkeypatch):
    other = tiny_clip(seed=1, projection_dim=6)
    both = Backbones([description(), {"name": "other", "feature_size": 6, "clip_seconds": 2.0}], [clip, other])
    video = as_video(frames)
    passes, clips = [], video.clips
    monkeypatch.setattr(video, "clips", lambda samplings: passes.append(len(samplings)) or clips(samplings))
    features = both.encode_video(video, batch_size=2)
    assert passes == [2]
    np.testing.assert_allclose(features[0], clip.encode_video(as_video(frames)), atol=1e-5)
    np.testing.assert_allclose(features[1], other.encode_video(as_video(frames)), atol=1e-5)
    texts = both.encode_text(["a dog", "a red dog"])
    assert [array.shape for array in texts] == [(4, 8), (5, 8)]  # of the first alone, the second reads no text
    assert both.clip_seconds == 2.0
    two_texts = Backbones([{"name": name, "text_feature_size": 8} for name in "ab"], [clip, other])
    assert two_texts.encode_text(["a dog"])[0].shape == (4, 16)
    assert two_texts.clip_seconds is None


def test_clips_that_show_the_same_frame_are_encoded_once(clip, frames, monkeypatch):
    encoded, encode = [], clip.encode_clips
    monkeypatch.setattr(clip, "encode_clips", lambda inputs: encoded.append(len(inputs)) or encode(inputs))
    for batch_size, batches in ((32, [2]), (1, [1, 1])):
        encoded.clear()
        features = clip.encode_video(open_video((frames[:2], 1 / 20), 2.0), batch_size)
        assert encoded == batches
        np.testing.assert_allclose(features, clip.encode_video(as_video(frames[:2])).repeat(10, axis=0), atol=1e-6)


def test_an_error_while_decoding_ends_the_encoding(clip, tmp_path):
    path = write_video(tmp_path / "a.ts", np.arange(200) / 10, noise=True)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 20000] = bytes(20000)
    path.write_bytes(content)
    threads = threading.active_count()
    with pytest.raises(ValueError, match=r"a\.ts: "):
        clip.encode_video(open_video(path, 1.0), batch_size=1)
    assert threading.active_count() == threads


def test_invalid_descriptions(clip):
    with pytest.raises(ValueError, match="backbone clip: `feature_size` is 12, but 512 in the config"):
        Backbones([description(feature_size=512)], [clip])
    with pytest.raises(ValueError, match=r"same `clip_seconds`, got \[1.0, 2.0\]"):
        Backbones([description(), description(name="slow", clip_seconds=1.0)], [clip, clip])


def test_one_backbone_alone(clip, frames, tmp_path):
    put_on_hub(clip, tmp_path / "cache", "someone/clip")
    clip.save_pretrained(tmp_path / "clip")
    from_hub = load_backbone("someone/clip", cache_dir=str(tmp_path / "cache"), local_files_only=True)
    for loaded in (from_hub, load_backbone(tmp_path / "clip", "cpu", torch.float32)):
        np.testing.assert_array_equal(loaded.encode_video(as_video(frames)), clip.encode_video(as_video(frames)))
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"bert: model type bert is not supported .*\(supported: clip, slowfast\)"):
        load_backbone(tmp_path / "bert")
    for name in ("no/model", str(tmp_path / "absent")):
        with pytest.raises(
            OSError, match=f"^{name}: not a checkpoint folder, and it could not be loaded from the Hub"
        ) as caught:
            load_backbone(name, local_files_only=True)
        assert "\n" not in str(caught.value)
