"""CLIP, SigLIP and SigLIP 2: what they compute, and how they are loaded."""

import importlib.util
import json
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipTokenizer, pipeline

from modeling_diffusionvmr import DiffusionVMRForMomentRetrieval, DiffusionVMRProcessor, VideoMomentRetrievalPipeline
from modeling_diffusionvmr.backbones import Backbones, load_backbone
from modeling_diffusionvmr.dual_encoders import ClipBackbone, SiglipBackbone
from modeling_diffusionvmr.modeling_diffusionvmr import TASK
from modeling_diffusionvmr.video import open_video
from small_checkpoint import as_video, gemma_tokenizer, put_on_hub, tiny_clip, tiny_siglip, tiny_siglip2
from test_video import index_of, write_video

MAKE = {
    "clip": tiny_clip,
    "siglip": tiny_siglip,
    "siglip2 at a fixed resolution": lambda: tiny_siglip(tokenizer=gemma_tokenizer()),
    "siglip2": tiny_siglip2,
}
SENTENCES = ["a red dog runs", "a dog", "a  RED dog"]


@pytest.fixture(scope="module")
def clip() -> ClipBackbone:
    return tiny_clip()


@pytest.fixture(params=list(MAKE))
def backbone(request):
    return MAKE[request.param]()


@pytest.fixture(params=[kind for kind in MAKE if kind != "clip"])
def siglip(request):
    return MAKE[request.param]()


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 24, 40, 3), dtype=np.uint8)


# CLIP


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


# SigLIP


@pytest.mark.parametrize("height", [24, 3])  # three rows are not three color channels
def test_siglip_computes_what_transformers_does(siglip, frames, height):
    frames = frames[:, :height]
    images = siglip.image_processor(images=[Image.fromarray(frame) for frame in frames], return_tensors="pt")
    lower = [sentence.lower() for sentence in SENTENCES]
    tokens = siglip.tokenizer(lower, padding="max_length", max_length=12, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        outputs = siglip.model(input_ids=tokens, **images)
    features = siglip.encode_video(as_video(frames), batch_size=3)
    assert features.shape == (7, 16) == (len(frames), siglip.feature_size) and features.dtype == np.float32
    np.testing.assert_allclose(features, outputs.vision_model_output.pooler_output, atol=1e-6)
    for sentence, row, hidden in zip(SENTENCES, tokens, outputs.text_model_output.last_hidden_state):
        (features,) = siglip.encode_text([sentence])
        end = row.tolist().index(siglip.tokenizer.eos_token_id)
        assert features.shape == (end + 1, 8) and features.dtype == np.float32
        np.testing.assert_allclose(features, hidden[: end + 1], atol=1e-6)


def test_naflex_keeps_the_aspect_ratio(frames):
    siglip = tiny_siglip2()
    wide = siglip.prepare((frames[0],))
    assert wide["spatial_shapes"].tolist() == [2, 4] and wide["pixel_attention_mask"].sum() == 8
    # A video whose pictures change their shape
    high = siglip.prepare((frames[1].transpose(1, 0, 2),))
    both = {name: torch.stack([wide[name], high[name]]) for name in wide}
    features = siglip.encode_clips(both)
    for one, expected in zip((wide, high), features):
        alone = siglip.encode_clips({name: tensor[None] for name, tensor in one.items()})
        np.testing.assert_allclose(alone[0], expected, atol=1e-6)


def test_long_sentence_for_siglip_keeps_its_end_token(siglip):
    sentence = "a red dog runs " * 9
    padded, text_model = [], siglip.model.text_model.forward
    siglip.model.text_model.forward = lambda input_ids: padded.append(input_ids[0].tolist()) or text_model(input_ids)
    count = len(siglip._token_ids(sentence))
    with pytest.warns(UserWarning, match=f"truncated from {count} tokens to 12"):
        (full,) = siglip.encode_text([sentence])
    with pytest.warns(UserWarning, match=f"truncated from {count} tokens to 5"):
        (cut,) = siglip.encode_text([sentence], max_tokens=5)
    assert full.shape == (12, 8) and cut.shape == (5, 8)
    for row, length in zip(padded, (12, 5)):
        kept = siglip.tokenizer(sentence, truncation=True, max_length=length, padding="max_length")["input_ids"]
        assert row == kept + [siglip.tokenizer.pad_token_id] * (12 - length)
        assert row[length - 1] == siglip.tokenizer.eos_token_id


# All of them


def test_saved_and_loaded(backbone, frames, tmp_path):
    backbone.save_pretrained(tmp_path)
    loaded = load_backbone(tmp_path, "cpu", torch.float32)
    assert type(loaded) is type(backbone) and type(loaded.image_processor) is type(backbone.image_processor)
    np.testing.assert_array_equal(loaded.encode_video(as_video(frames)), backbone.encode_video(as_video(frames)))
    for one, other in zip(loaded.encode_text(SENTENCES), backbone.encode_text(SENTENCES)):
        np.testing.assert_array_equal(one, other)


def test_folder_of_a_repository_on_the_hub(backbone, tmp_path):
    put_on_hub(backbone, tmp_path, "someone/model", "backbone")
    place = {"subfolder": "backbone", "cache_dir": str(tmp_path), "local_files_only": True}
    loaded = load_backbone("someone/model", **place)
    np.testing.assert_array_equal(loaded.encode_text(["a dog"])[0], backbone.encode_text(["a dog"])[0])


def test_pipeline(backbone, tiny_config, frames, tmp_path):
    sizes = {"feature_size": backbone.feature_size, "text_feature_size": backbone.text_feature_size}
    backbones = Backbones([{"name": "mine", "folder": "mine", **sizes, "clip_seconds": 2.0}], [backbone])
    config = tiny_config(
        backbones=backbones.descriptions, video_feature_size=backbone.feature_size, text_feature_size=8
    )
    model, processor = DiffusionVMRForMomentRetrieval(config), DiffusionVMRProcessor([backbone.feature_size], 8)
    retrieve = VideoMomentRetrievalPipeline(model=model, processor=processor, backbones=backbones)
    moments = retrieve((frames, 0.5), SENTENCES)
    assert len(moments) == 3 and all(moments)
    retrieve.save_pretrained(tmp_path)
    assert pipeline(TASK, model=str(tmp_path))((frames, 0.5), SENTENCES) == moments


def test_features_are_those_of_the_clips_frame(backbone, tmp_path):
    path = write_video(tmp_path / "a.mp4", np.arange(73) / 10)
    every, clips = open_video(path, 0.1), open_video(path, 1.0)
    indices = [index_of(frame) for frame in clips]
    assert indices == [4, 14, 24, 34, 44, 54, 64] and [index_of(frame) for frame in every] == list(range(73))
    distances = np.abs(backbone.encode_video(clips)[:, None] - backbone.encode_video(every)).max(-1)
    assert distances.argmin(1).tolist() == indices
    assert distances.min(1).max() < 1e-6 < 1e-4 < np.sort(distances, axis=1)[:, 1].min()


@pytest.mark.filterwarnings("ignore:query truncated")
def test_encoding_text_changes_no_shared_state(backbone, tmp_path):
    sentences = ["a red dog runs " * 5, "dog", "a red dog runs fast"]
    backbone.save_pretrained(tmp_path / "before")
    expected = backbone.encode_text(sentences, 5)
    lengths = [len(backbone._token_ids(sentence)) for sentence in sentences]

    def encode(index):
        return [backbone.encode_text(sentences[::step], limit) for step in (1, -1) for limit in (5, 10)]

    with ThreadPoolExecutor(8) as pool:
        for short, full, short_reversed, full_reversed in pool.map(encode, range(40)):
            assert [len(array) for array in short] == [min(length, 5) for length in lengths]
            assert [len(array) for array in full] == [min(length, 10) for length in lengths]
            for arrays in (short, short_reversed[::-1]):
                for array, wanted in zip(arrays, expected):
                    np.testing.assert_allclose(array, wanted, atol=1e-6)
            assert [len(array) for array in full_reversed[::-1]] == [len(array) for array in full]
    backbone.save_pretrained(tmp_path / "after")
    before, after = (tmp_path / name / "tokenizer.json" for name in ("before", "after"))
    assert before.read_bytes() == after.read_bytes()


@pytest.mark.filterwarnings("ignore:query truncated")
def test_truncation_and_padding_of_a_loaded_tokenizer_are_turned_off(backbone):
    expected = [backbone.encode_text([sentence])[0] for sentence in ("dog", "a red dog runs " * 5)]
    backbone.tokenizer(["a red dog", "dog"], truncation=True, max_length=4, padding="max_length")
    assert backbone.tokenizer.backend_tokenizer.truncation and backbone.tokenizer.backend_tokenizer.padding
    loaded = type(backbone)(backbone.model, backbone.image_processor, backbone.tokenizer)
    backend = loaded.tokenizer.backend_tokenizer
    assert backend.truncation is None and backend.padding is None
    for sentence, features in zip(("dog", "a red dog runs " * 5), expected):
        np.testing.assert_array_equal(loaded.encode_text([sentence])[0], features)


@pytest.mark.parametrize("sentence", ["", " \n", None, b"a dog", "a \ud83d dog"])
def test_invalid_sentence(backbone, sentence):
    with pytest.raises(ValueError, match="^a query (must be a string that is not blank|cannot be encoded)"):
        backbone.encode_text(["a dog", sentence])


def test_frozen_and_movable(backbone, frames):
    assert not backbone.model.training
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    expected, (text,) = backbone.encode_video(as_video(frames)), backbone.encode_text(["a dog"])
    half = backbone.to("cpu", torch.bfloat16)
    assert half.model.dtype == torch.bfloat16
    features = half.encode_video(as_video(frames))
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, expected, atol=0.1)
    (features,) = half.encode_text(["a dog"])
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, text, atol=0.1)


# Checkpoints that cannot be loaded


def test_without_a_tokenizer(backbone, tmp_path):
    backbone.save_pretrained(tmp_path)
    for path in tmp_path.glob("*token*"):
        path.unlink()
    with pytest.raises(OSError, match=f"^{tmp_path}: has no tokenizer"):
        load_backbone(tmp_path, local_files_only=True)


def test_tokenizer_of_another_model(backbone, tmp_path):
    backbone.model.config.text_config.vocab_size = len(backbone.tokenizer) - 1
    embedding = backbone.model.text_model.embeddings.token_embedding
    embedding.weight = torch.nn.Parameter(embedding.weight[:-1])
    backbone.save_pretrained(tmp_path)
    count = len(backbone.tokenizer)
    with pytest.raises(
        ValueError, match=f"^{tmp_path}: the tokenizer has {count} tokens, but the model only {count - 1}"
    ):
        load_backbone(tmp_path)


def test_siglip_without_a_padding_token(siglip, tmp_path):
    siglip.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": None}))
    with pytest.raises(ValueError, match=f"^{tmp_path}: the tokenizer has no padding token"):
        load_backbone(tmp_path)


def test_siglip_without_a_pooling_head(siglip, tmp_path):
    siglip.model.config.vision_config.vision_use_head = False
    siglip.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path}: the model has no pooling head"):
        load_backbone(tmp_path)


def as_sentencepiece(folder):
    """Make the tokenizer of a saved SigLIP what it is on the Hub."""
    config = {"tokenizer_class": "SiglipTokenizer", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.skipif(importlib.util.find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
def test_siglip_needs_sentencepiece(tmp_path):
    tiny_siglip().save_pretrained(tmp_path)
    as_sentencepiece(tmp_path)
    (tmp_path / "spiece.model").touch()
    with pytest.raises(ImportError, match=f"^{tmp_path}: its tokenizer needs .* pip install sentencepiece protobuf$"):
        load_backbone(tmp_path)


def test_siglip_with_sentencepiece(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    siglip = tiny_siglip()
    siglip.model.resize_token_embeddings(30)
    siglip.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    as_sentencepiece(tmp_path)
    (tmp_path / "text.txt").write_text("a red dog runs fast\nred dogs\nfast runs\n" * 50)
    options = {"vocab_size": 20, "bos_id": -1, "pad_id": 0, "eos_id": 1, "unk_id": 2, "add_dummy_prefix": False}
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "spiece"), hard_vocab_limit=False, **options
    )
    loaded = load_backbone(tmp_path)
    assert isinstance(loaded, SiglipBackbone) and isinstance(loaded.tokenizer, SiglipTokenizer)
    tokens = loaded.tokenizer("a red dog", padding="max_length", max_length=12, return_tensors="pt")["input_ids"]
    length = len(loaded.tokenizer("a red dog")["input_ids"])
    expected = loaded.model.text_model(input_ids=tokens).last_hidden_state[0, :length].detach().numpy()
    for sentence in ("a red dog", "A red, dog!"):
        np.testing.assert_allclose(loaded.encode_text([sentence])[0], expected, atol=1e-6)
    loaded.save_pretrained(tmp_path / "again")
    np.testing.assert_array_equal(
        load_backbone(tmp_path / "again").encode_text(["a dog"]), loaded.encode_text(["a dog"])
    )
