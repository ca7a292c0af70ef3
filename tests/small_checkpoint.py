"""A small checkpoint with a random model and a random CLIP, shared by the tests of everything that loads or saves."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from modeling_diffusionvmr import DiffusionVMRForMomentRetrieval, DiffusionVMRProcessor, VideoMomentRetrievalPipeline
from modeling_diffusionvmr.backbones import Backbones
from modeling_diffusionvmr.dual_encoders import ClipBackbone
from modeling_diffusionvmr.video import Video, open_video

WORDS = ["a", "red", "dog", "runs", "fast"]


def tiny_clip(seed=0, projection_dim=12) -> ClipBackbone:
    """A random CLIP whose vocabulary has five words and their letters."""
    letters = sorted(set("".join(WORDS)))
    vocab = ["<|startoftext|>", "<|endoftext|>"] + letters + [letter + "</w>" for letter in letters]
    merges = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
            vocab.append(pieces[0])
    vocab = {token: index for index, token in enumerate(dict.fromkeys(vocab))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=list(dict.fromkeys(merges)), model_max_length=10)
    torch.manual_seed(seed)
    layers = {"intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPConfig(
        text_config={"vocab_size": len(vocab), "hidden_size": 8, "max_position_embeddings": 10, **layers, **special},
        vision_config={"hidden_size": 16, "image_size": 16, "patch_size": 8, **layers},
        projection_dim=projection_dim,
    )
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return ClipBackbone(CLIPModel(config), processor, tokenizer)


def as_video(frames) -> Video:
    """Return a video with one frame (H, W, 3) per clip of 2 s."""
    return open_video((frames, 0.5), 2.0)


def description(**changes) -> dict:
    place = {} if "id" in changes else {"folder": "clip"}
    return {"name": "clip", **place, "feature_size": 12, "text_feature_size": 8, "clip_seconds": 2.0, **changes}


def save_checkpoint(folder: Path, tiny_config: Callable, **fields) -> None:
    """Save a model, its backbone and its processor, whose fields are given, as the pipeline saves them."""
    torch.manual_seed(0)
    backbones = Backbones([description(id="some/hub-id")], [tiny_clip()])
    model = DiffusionVMRForMomentRetrieval(tiny_config(backbones=backbones.descriptions))
    processor = DiffusionVMRProcessor([12], 8, max_clips=20, max_tokens=8, **fields)
    VideoMomentRetrievalPipeline(model=model, processor=processor, backbones=backbones).save_pretrained(folder)
    assert model.config.backbones == backbones.descriptions  # saving leaves the model as it was


def put_on_hub(clip, cache, name, subfolder=""):
    """Save a backbone as a Hub repository in the cache, where refs/main names the snapshot."""
    repository, commit = cache / f"models--{name.replace('/', '--')}", "0" * 40
    clip.save_pretrained(repository / "snapshots" / commit / subfolder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
