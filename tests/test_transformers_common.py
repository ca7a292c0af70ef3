"""
Run the common model tests of `transformers` on our models.

`fetch_transformers_tests.py` puts these tests into the cache. They are imported under another package name than
`tests`, with empty stand-ins for modules that the source distribution leaves out.
"""

import dataclasses
import importlib
import os
import sys
import types
import unittest
import unittest.mock
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from fetch_transformers_tests import TESTS_DIR
from modeling_diffusionvmr import DiffusionVMRConfig, DiffusionVMRForMomentRetrieval, DiffusionVMRModel

if not TESTS_DIR.is_dir():
    raise FileNotFoundError(f"{TESTS_DIR} is missing: run `python tests/fetch_transformers_tests.py` once")

# Every common field of a configuration, with a value that is not its default
CONFIG_COMMON_KWARGS = {
    "architectures": ["DiffusionVMRModel"],
    "chunk_size_feed_forward": 5,
    "dtype": "float16",
    "id2label": {0: "moment"},
    "label2id": {"moment": 0},
    "output_attentions": True,
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}
STAND_INS = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {"config_common_kwargs": CONFIG_COMMON_KWARGS},
}


def import_transformers_tests(*names: str) -> list[types.ModuleType]:
    """Import the named modules of the cached tests."""
    package = types.ModuleType("transformers_tests")
    package.__path__ = [str(TESTS_DIR)]
    sys.modules[package.__name__] = package
    for name, contents in STAND_INS.items():
        folder, _ = name.split(".")
        for part, attributes in ((folder, {"__path__": []}), (name, contents)):
            module = sys.modules[f"{package.__name__}.{part}"] = types.ModuleType(f"{package.__name__}.{part}")
            vars(module).update(attributes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
        return [importlib.import_module(f"{package.__name__}.{name}") for name in names]


modeling_common, configuration_common = import_transformers_tests("test_modeling_common", "test_configuration_common")
floats_tensor = modeling_common.floats_tensor

# Tests that do not apply on any machine, and why
SKIPPED = {
    "test_attn_implementation_composite_models": "no sub-configurations",
    "test_can_load_from_already_mapped_keys": "checkpoints use the model's parameter names, so nothing is converted",
    "test_can_set_attention_dynamically_composite_model": "no sub-configurations",
    "test_causal_lm_loss_honors_shift_labels": "no language modeling head",
    "test_eager_matches_batched_and_grouped_inference_0_fp16": "no mixture of experts",
    "test_eager_matches_batched_and_grouped_inference_1_fp32": "no mixture of experts",
    "test_eager_matches_batched_and_grouped_inference_2_bf16": "no mixture of experts",
    "test_encoder_decoder_loss_no_double_shift": "no language modeling head",
    "test_inputs_embeds": "inputs are features, not token ids",
    "test_inputs_embeds_matches_input_ids": "inputs are features, not token ids",
    "test_internal_model_config_and_subconfig_are_same": "no sub-configurations",
    "test_keep_in_fp32_modules": "the parts that stay in float32 have no weights",
    "test_keep_in_fp32_modules_exist": "the parts that stay in float32 have no weights",
    "test_model_rope_scaling_frequencies": "sine positions, not rotary ones",
    "test_model_rope_scaling_from_config_0_linear": "sine positions, not rotary ones",
    "test_model_rope_scaling_from_config_1_dynamic": "sine positions, not rotary ones",
    "test_model_rope_scaling_from_config_2_yarn": "sine positions, not rotary ones",
    "test_model_rope_with_partial_rotation": "sine positions, not rotary ones",
    "test_moe_models_record_router_logits": "no mixture of experts",
    "test_output_router_logits_from_config": "no mixture of experts",
    "test_resize_embeddings_untied": "no vocabulary",
    "test_resize_embeddings_untied_no_reinit_on_post_init": "no vocabulary",
    "test_resize_position_vector_embeddings": "positions are computed, not learned",
    "test_resize_tokens_embeddings": "no vocabulary",
    "test_reverse_loading_mapping": "checkpoints use the model's parameter names, so nothing is converted",
    "test_sdpa_can_dispatch_composite_models": "no sub-configurations",
    "test_sliding_window_mask": "attention is over the whole input",
    "test_tied_head_has_a_tp_plan_entry": "no plan for tensor parallelism",
    "test_tp_plan_matches_params": "no plan for tensor parallelism",
    "test_vision_axial_rope": "sine positions, not rotary ones",
}
# What a test needs on the machine. If that is there, the test runs or is skipped for another reason
DEPENDS_ON_MACHINE = {
    "test_can_load_with_device_context_manager": "an accelerator",
    "test_can_load_with_global_device_set": "an accelerator",
    "test_cpu_offload": "an accelerator",
    "test_disk_offload_bin": "an accelerator",
    "test_disk_offload_safetensors": "an accelerator",
    "test_flash_attn_2_can_compile_with_attention_mask_None_without_graph_break": "flash attention 2",
    "test_flash_attn_2_can_dispatch_composite_models": "flash attention 2",
    "test_flash_attn_2_fp32_ln": "flash attention 2",
    "test_flash_attn_2_from_config": "flash attention 2",
    "test_flash_attn_2_inference_equivalence": "flash attention 2",
    "test_flash_attn_2_inference_equivalence_right_padding": "flash attention 2",
    "test_flash_attn_3_can_dispatch_composite_models": "flash attention 3",
    "test_flash_attn_3_from_config": "flash attention 3",
    "test_flash_attn_3_inference_equivalence": "flash attention 3",
    "test_flash_attn_3_inference_equivalence_right_padding": "flash attention 3",
    "test_flash_attn_4_can_dispatch_composite_models": "flash attention 4",
    "test_flash_attn_4_from_config": "flash attention 4",
    "test_flash_attn_4_inference_equivalence": "flash attention 4",
    "test_flash_attn_4_inference_equivalence_right_padding": "flash attention 4",
    "test_flash_attn_kernels_inference_equivalence": "the kernels library",
    "test_flash_attn_kernels_mps_inference_equivalence": "the kernels library",
    "test_flex_attention_with_grads": "an accelerator",
    "test_kernels_can_load_without_crashing": "the kernels library",
    "test_model_parallelism": "two accelerators",
    "test_resize_embeddings_untied_with_deepspeed": "deepspeed",
    "test_resize_embeddings_untied_with_deepspeed_multi_gpu": "deepspeed",
    "test_resize_tokens_embeddings_with_deepspeed": "deepspeed",
    "test_resize_tokens_embeddings_with_deepspeed_multi_gpu": "deepspeed",
    "test_sdpa_can_compile_dynamic": "an accelerator",
    "test_sdpa_can_dispatch_on_flash": "an accelerator",
    "test_torch_compile_for_training": "an accelerator",
}


class SkipsAreAccountedFor:
    """Fail tests that are skipped without an entry in the tables above, and tests that run despite one."""

    def run(self, result=None):
        return super().run(_CheckedResult(result))


class _CheckedResult:
    """A test result that turns unexpected skips and unexpected runs into failures."""

    def __init__(self, result):
        self._result = result

    def __getattr__(self, name):
        return getattr(self._result, name)

    def _fail(self, test, message):
        try:
            raise AssertionError(message)
        except AssertionError:
            self._result.addFailure(test, sys.exc_info())

    def addSkip(self, test, reason):
        name = getattr(test, "test_case", test)._testMethodName  # a subtest belongs to its test
        if name in SKIPPED or name in DEPENDS_ON_MACHINE:
            self._result.addSkip(test, reason)
        else:
            self._fail(test, f"skipped without an entry in SKIPPED: {reason}")

    def addSuccess(self, test):
        if test._testMethodName in SKIPPED:
            self._fail(test, "ran despite its entry in SKIPPED; remove the entry")
        else:
            self._result.addSuccess(test)


class ModelTester:
    """A small model and its inputs, under the names that the common tests use."""

    batch_size = 3
    is_training = True
    num_hidden_layers = 2
    num_hidden_states_types = 2  # encoder and decoder
    num_attention_heads = 4
    hidden_size = 32
    video_length, text_length, num_proposals = 9, 5, 7
    encoder_seq_length = video_length + text_length
    decoder_seq_length = num_proposals

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return DiffusionVMRConfig(
            d_model=self.hidden_size,
            encoder_layers=self.num_hidden_layers,
            decoder_layers=self.num_hidden_layers,
            encoder_attention_heads=self.num_attention_heads,
            decoder_attention_heads=self.num_attention_heads,
            encoder_ffn_dim=40,
            decoder_ffn_dim=40,
            video_feature_size=11,
            text_feature_size=6,
            max_clips=self.video_length,
            max_tokens=self.text_length,
            num_proposals=self.num_proposals,
            max_training_proposals=self.num_proposals,
            roi_bins=4,
            dynamic_size=8,
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        video_mask = torch.ones(self.batch_size, self.video_length, dtype=torch.long)
        text_mask = torch.ones(self.batch_size, self.text_length, dtype=torch.long)
        video_mask[1, -2:] = 0
        text_mask[2, -1:] = 0
        inputs = {
            "video_features": floats_tensor([self.batch_size, self.video_length, config.video_feature_size]),
            "text_features": floats_tensor([self.batch_size, self.text_length, config.text_feature_size]),
            "video_mask": video_mask.to(modeling_common.torch_device),
            "text_mask": text_mask.to(modeling_common.torch_device),
            "noisy_spans": floats_tensor([self.batch_size, self.num_proposals, 2], scale=4) - 2,
            "timesteps": torch.tensor([999, 500, 3], device=modeling_common.torch_device),
        }
        return config, inputs

    def labels(self):
        device = modeling_common.torch_device
        pairs = {
            "saliency_pos": torch.tensor([1, 2], device=device),
            "saliency_neg": torch.tensor([5, 0], device=device),
        }
        spans = [[[0.3, 0.2], [0.7, 0.4]], [[0.5, 0.6]], []]
        return [{"spans": torch.tensor(rows, device=device).reshape(-1, 2), **pairs} for rows in spans]


class DiffusionVMRCommonTest(SkipsAreAccountedFor, modeling_common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (DiffusionVMRModel, DiffusionVMRForMomentRetrieval)
    additional_model_inputs = ("text_features", "noisy_spans", "timesteps")
    test_resize_embeddings = False
    # Otherwise decided by the year in a copyright line, which our files do not have
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        # The tests use this mapping to recognize the model without a loss
        known = unittest.mock.patch.dict(modeling_common.MODEL_MAPPING_NAMES, diffusionvmr=DiffusionVMRModel.__name__)
        known.start()
        self.addCleanup(known.stop)
        self.model_tester = ModelTester(self)
        self.config_tester = configuration_common.ConfigTester(
            self, config_class=DiffusionVMRConfig, has_text_modality=False, d_model=48
        )

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        # The tests pass these to any encoder-decoder, but our decoder reads spans
        inputs.pop("decoder_input_ids", None)
        inputs.pop("decoder_attention_mask", None)
        if return_labels and model_class is DiffusionVMRForMomentRetrieval:
            # The model draws noise and timesteps from the labels
            del inputs["noisy_spans"], inputs["timesteps"]
            inputs["labels"] = self.model_tester.labels()
            inputs["negative_text_features"] = inputs["text_features"].roll(1, dims=0)
            inputs["negative_text_mask"] = inputs["text_mask"].roll(1, dims=0)
        return inputs

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_config_stand_in_is_complete(self):
        common = {field.name for field in dataclasses.fields(modeling_common.PreTrainedConfig)}
        self.assertEqual(common - CONFIG_COMMON_KWARGS.keys(), {"transformers_version", "is_encoder_decoder"})

    def test_tables_of_skips_are_current(self):
        stale = {name for name in (*SKIPPED, *DEPENDS_ON_MACHINE) if not hasattr(self, name)}
        self.assertEqual(stale, set())

    def _model(self, model_class, config):
        return model_class._from_config(config, attn_implementation="eager").to(modeling_common.torch_device)

    @torch.no_grad()
    def test_decoder_is_recorded_too(self):
        """By argument and by configuration. An argument overrides the configuration."""
        tester = self.model_tester
        encoder = (tester.batch_size, tester.encoder_seq_length, tester.hidden_size)
        decoder = (tester.batch_size, tester.decoder_seq_length, tester.hidden_size)
        expected = {
            "encoder_hidden_states": [encoder] * (tester.num_hidden_layers + 1),
            "decoder_hidden_states": [decoder] * (tester.num_hidden_layers + 1),
            "encoder_attentions": [(encoder[0], tester.num_attention_heads, encoder[1], encoder[1])],
            "decoder_attentions": [(decoder[0], tester.num_attention_heads, decoder[1], decoder[1])],
        }
        expected["encoder_attentions"] *= tester.num_hidden_layers
        expected["decoder_attentions"] *= tester.num_hidden_layers
        for model_class in self.all_model_classes:
            config, inputs = tester.prepare_config_and_inputs_for_common()
            inputs = self._prepare_for_class(inputs, model_class)
            model = self._model(model_class, config).eval()
            without = model(**inputs)
            by_argument = model(**inputs, output_attentions=True, output_hidden_states=True)
            model.config.output_attentions = model.config.output_hidden_states = True
            for outputs in (by_argument, model(**inputs)):
                self.assertEqual(set(outputs) - set(without), set(expected))
                for name, shapes in expected.items():
                    self.assertEqual([tensor.shape for tensor in outputs[name]], shapes)
                torch.testing.assert_close(outputs.encoder_hidden_states[-1], without.encoder_last_hidden_state)
            without_flags = model(**inputs, output_attentions=False, output_hidden_states=False)
            self.assertEqual(set(without_flags), set(without))

    # These tests look for one stack of layers, or for cross-attention, which our decoder does not have (it reads RoI
    # features). They make the same checks with our names.

    @torch.no_grad()
    def test_can_capture_specific_layers_hidden_states(self):
        for model_class in self.all_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            inputs = self._prepare_for_class(inputs, model_class)
            model = self._model(model_class, config).eval()
            everything = model(**inputs, output_hidden_states=True)
            outputs = model(**inputs, output_hidden_states=[0, -1])
            for name in ("encoder_hidden_states", "decoder_hidden_states"):
                self.assertEqual(len(outputs[name]), len(everything[name]))
                for index, state in enumerate(outputs[name]):
                    if index in (0, len(everything[name]) - 1):
                        torch.testing.assert_close(state, everything[name][index])
                    else:
                        self.assertIsNone(state)

    def test_retain_grad_hidden_states_attentions(self):
        for model_class in self.all_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            config.output_hidden_states = True
            config.output_attentions = True
            outputs = self._model(model_class, config)(**self._prepare_for_class(inputs, model_class))
            names = ("encoder_hidden_states", "decoder_hidden_states", "encoder_attentions", "decoder_attentions")
            # A decoder layer receives only the spans of the previous layer, and those are detached
            retained = {name: outputs[name][0 if name.startswith("encoder") else -1] for name in names}
            for tensor in retained.values():
                tensor.retain_grad()
            outputs[0].flatten()[0].backward()
            for name, tensor in retained.items():
                with self.subTest(f"{model_class.__name__}: {name}"):
                    self.assertGreater(tensor.grad.abs().sum().item(), 0)

    # Tests of the embedding table, with the video projection in its place

    def test_model_get_set_embeddings(self):
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            self.assertIs(model.get_input_embeddings(), model.base_model.video_projection)
            replacement = torch.nn.Linear(10, 10)
            model.set_input_embeddings(replacement)
            self.assertIs(model.base_model.video_projection, replacement)
            self.assertIsNone(model.get_output_embeddings())

    def test_enable_input_require_grads_with_gradient_checkpointing(self):
        """A frozen model with one trainable part, as in adapter training."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        inputs = self._prepare_for_class(inputs, DiffusionVMRForMomentRetrieval, return_labels=True)
        model = self._model(DiffusionVMRForMomentRetrieval, config).train().requires_grad_(False)
        learns = model.model.encoder.layers[0].self_attn.v_proj.weight.requires_grad_(True)
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
        model(**inputs).loss.backward()
        self.assertIsNotNone(learns.grad)
        self.assertGreater(learns.grad.abs().sum().item(), 0)
