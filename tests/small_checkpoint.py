"""Small random backbones, and a checkpoint of a model with one, shared by the tests of all that loads or saves."""

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    GemmaTokenizer,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    TokenizersBackend,
)

from modeling_diffusionvmr import DiffusionVMRForMomentRetrieval, DiffusionVMRProcessor, VideoMomentRetrievalPipeline
from modeling_diffusionvmr.backbones import Backbones
from modeling_diffusionvmr.dual_encoders import ClipBackbone, Siglip2Backbone, SiglipBackbone
from modeling_diffusionvmr.video import Video, open_video

WORDS = ["a", "red", "dog", "runs", "fast"]


LAYERS = {"intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def merges_of(words: list[list[str]]) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the merges that join the pieces of each word, and the tokens that they make."""
    merges, tokens = [], []
    for pieces in words:
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
            tokens.append(pieces[0])
    return list(dict.fromkeys(merges)), tokens


def tiny_clip(seed=0, projection_dim=12) -> ClipBackbone:
    """A random CLIP whose vocabulary has five words and their letters."""
    letters = sorted(set("".join(WORDS)))
    merges, tokens = merges_of([[*word[:-1], word[-1] + "</w>"] for word in WORDS])
    vocab = ["<|startoftext|>", "<|endoftext|>"] + letters + [letter + "</w>" for letter in letters] + tokens
    vocab = {token: index for index, token in enumerate(dict.fromkeys(vocab))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=10)
    torch.manual_seed(seed)
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPConfig(
        text_config={"vocab_size": len(vocab), "hidden_size": 8, "max_position_embeddings": 10, **LAYERS, **special},
        vision_config={"hidden_size": 16, "image_size": 16, "patch_size": 8, **LAYERS},
        projection_dim=projection_dim,
    )
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return ClipBackbone(CLIPModel(config), processor, tokenizer)


def siglip_tokenizer() -> TokenizersBackend:
    """A tokenizer like the `tokenizer.json` of SigLIP, which ends and pads sentences with the same token."""
    pieces = [("</s>", 0.0), ("<unk>", 0.0), *[(f"\u2581{word}", -1.0) for word in WORDS]]
    backend = Tokenizer(models.Unigram(pieces, unk_id=1))
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Strip()])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    special = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    return TokenizersBackend(tokenizer_object=backend, model_input_names=["input_ids"], **special)


def gemma_tokenizer(tokenizer_class=GemmaTokenizer):
    """A tokenizer of SigLIP 2. `GemmaTokenizer` leaves upper case as it is."""
    merges, tokens = merges_of([[*f"\u2581{word}"] for word in WORDS])
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokens = dict.fromkeys([*special, *sorted(set("\u2581".join(WORDS))), *tokens])
    vocab = {token: index for index, token in enumerate(tokens)}
    options = {"add_bos_token": False, "add_eos_token": True, "model_input_names": ["input_ids"]}
    return tokenizer_class(vocab=vocab, merges=merges, padding_side="right", **options)


def siglip_sizes(tokenizer) -> dict:
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = {"vocab_size": len(tokenizer), "hidden_size": 8, "max_position_embeddings": 12, **LAYERS, **special}
    text["projection_size"] = 16
    return {"text_config": text, "vision_config": {"hidden_size": 16, "patch_size": 8, **LAYERS}}


def tiny_siglip(seed=0, tokenizer=None) -> SiglipBackbone:
    """A random SigLIP. Its image processor resizes frames to 16x16 pixels."""
    tokenizer = tokenizer or siglip_tokenizer()
    sizes = siglip_sizes(tokenizer)
    sizes["vision_config"]["image_size"] = 16
    torch.manual_seed(seed)
    return SiglipBackbone(
        SiglipModel(SiglipConfig(**sizes)), SiglipImageProcessorPil(size={"height": 16, "width": 16}), tokenizer
    )


def tiny_siglip2(seed=0) -> Siglip2Backbone:
    """A random SigLIP 2 NaFlex of at most nine patches."""
    tokenizer = gemma_tokenizer(Siglip2Tokenizer)
    sizes = siglip_sizes(tokenizer)
    sizes["vision_config"]["num_patches"] = 9
    torch.manual_seed(seed)
    processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=9)
    return Siglip2Backbone(Siglip2Model(Siglip2Config(**sizes)), processor, tokenizer)


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


def put_on_hub(backbone, cache, name, subfolder=""):
    """Save a backbone as a Hub repository in the cache, where refs/main names the snapshot."""
    repository, commit = cache / f"models--{name.replace('/', '--')}", "0" * 40
    backbone.save_pretrained(repository / "snapshots" / commit / subfolder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
