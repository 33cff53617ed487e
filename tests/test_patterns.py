"""Which test speaks for which way of writing LoRA, and for which situation in training."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

MATCHED = "match"
REFUSED = "refuse"
FROZEN = "a frozen linear layer"

# LoRA as libraries write it: what becomes of it, and the tests that build it.
DIALECTS: dict[str, tuple[str, str]] = {
    "PEFT lora.Linear": (
        MATCHED,
        "passes/test_match_peft.py::test_peft_linear_is_one_site_within_the_fp8_bound "
        "passes/test_match_peft.py::test_peft_linear_takes_any_number_of_dimensions",
    ),
    "PEFT, lora_dropout > 0": (
        f'{MATCHED}; {REFUSED} with dropout="reject"',
        "passes/test_match_peft.py::test_an_adapter_reads_the_dropped_x_its_base_layer_x_itself "
        "passes/test_match_peft.py::test_dropout_draws_the_numbers_that_eager_draws "
        "passes/test_match_peft.py::test_adapter_dropout_is_ignored_where_asked "
        "passes/test_match_peft.py::test_adapter_dropout_is_rejected_where_asked "
        "passes/test_match_peft.py::test_no_dropout_is_left_in_evaluation",
    ),
    "PEFT use_rslora": (
        MATCHED,
        "passes/test_match_peft.py::test_rslora_scales_by_the_root_of_the_rank",
    ),
    "PEFT lora_bias, PiSSA, OLoRA": (
        MATCHED,
        "passes/test_match_peft.py::test_peft_linear_is_one_site_within_the_fp8_bound",
    ),
    "LoftQ, CorDA, EVA, LoRA-GA, orthogonal, QA-LoRA on an unquantized layer": (
        MATCHED,
        "test_dialects.py::test_initializations_are_one_site_within_the_fp8_bound",
    ),
    "PEFT rank_pattern, alpha_pattern": (
        MATCHED,
        "passes/test_match_peft.py::test_rank_and_alpha_patterns_give_each_site_its_own",
    ),
    "PEFT on Conv1D (fan_in_fan_out)": (
        MATCHED,
        "test_conv1d.py::test_a_conv1d_is_one_site_within_the_fp8_bound "
        "test_conv1d.py::test_the_base_is_laid_out_once",
    ),
    "PEFT on Embedding, Conv2d": (
        REFUSED,
        "passes/test_match_refused.py::test_lora_on_an_embedding_is_refused "
        "passes/test_match_refused.py::test_lora_on_a_convolution_is_refused "
        "test_dialects_refused.py::test_adapted_convolution_is_refused",
    ),
    "PEFT ParamWrapper, experts": (
        f"{MATCHED}, as transformers groups them; {REFUSED} elsewhere",
        "test_merged_experts.py::test_programs_compute_what_float64_does_on_the_same_operands "
        "test_experts.py::test_one_graph_gives_what_peft_gives "
        "test_dialects_refused.py::test_experts_are_refused "
        "test_dialects_refused.py::test_a_param_wrapper_is_refused "
        "test_experts.py::test_what_is_refused_goes_by_its_whole_path_and_a_remedy",
    ),
    "PEFT DoRA, aLoRA, BD-LoRA, VeLoRA, KaSA, MonteCLoRA": (
        f"{REFUSED}; the base layer in FP8 where it is in the graph",
        "test_dialects_refused.py::test_peft_variants_are_refused "
        "test_dialects_refused.py::test_the_base_layer_of_a_variant_runs_in_fp8",
    ),
    "PEFT MiCA": (MATCHED, "test_dialects.py::test_mica_trains_a_on_a_frozen_b"),
    "PEFT Arrow": (REFUSED, "test_dialects_refused.py::test_arrow_is_refused"),
    "PEFT, mixed batches (adapter_names)": (
        REFUSED,
        "test_dialects_refused.py::test_mixed_batches_of_adapters_are_refused",
    ),
    "PEFT, several active adapters": (
        MATCHED,
        "passes/test_match_peft.py::test_several_active_adapters_of_one_layer_are_one_site "
        "passes/test_match_peft.py::test_of_several_adapters_each_has_the_dropout_that_eager_draws",
    ),
    "PEFT, layers that no adapter is put on": (
        "in FP8, but for heads, tied weights, routers and small layers",
        "passes/test_frozen.py::test_frozen_layers_are_siblings_of_adapted_ones "
        "passes/test_frozen_left.py::"
        "test_heads_tied_weights_routers_and_small_layers_are_left_with_the_reason",
    ),
    "PEFT disable_adapter, merge_adapter": (
        FROZEN,
        "test_dialects_refused.py::"
        "test_no_adapter_in_the_graph_a_frozen_layer_and_nothing_to_report "
        "passes/test_frozen.py::test_a_disabled_adapter_leaves_the_numbers_of_b_at_zero "
        "passes/test_match_refused.py::test_a_peft_layer_without_its_adapter_is_a_plain_linear",
    ),
    "LoRA-FA": (MATCHED, "test_dialects.py::test_lora_fa"),
    "LoRA+": (MATCHED, "test_dialects.py::test_lora_plus_is_the_learning_rate_of_b"),
    "loralib Linear": (
        f"{MATCHED}; merged, {FROZEN}",
        "passes/test_match.py::test_loralib_linear "
        "passes/test_match_refused.py::test_a_merged_loralib_layer_is_a_plain_linear",
    ),
    "torchtune LoRALinear": (MATCHED, "passes/test_match.py::test_torchtune_linear"),
    "torchtitan, litgpt, einsum, x · (W + s · B · A)ᵀ": (
        MATCHED,
        "test_dialects.py::test_other_spellings_are_one_site_within_the_fp8_bound "
        "test_dialects.py::test_a_parametrized_weight",
    ),
    "litgpt, merged QKV; other algebra": (
        REFUSED,
        "test_dialects_refused.py::test_what_can_not_be_read_is_reported",
    ),
    "diffusers' attention": (MATCHED, "test_dialects.py::test_diffusers_attention"),
    "by hand": (
        MATCHED,
        "passes/test_match.py::test_hand_written_lora_is_one_site_within_the_fp8_bound "
        "passes/test_rewrite.py::test_any_spelling_from_dynamo_is_one_site_within_the_fp8_bound "
        "passes/test_rewrite.py::"
        "test_any_spelling_from_symbolic_trace_is_one_site_within_the_fp8_bound "
        "passes/test_rewrite.py::test_any_spelling_from_export_is_one_site_within_the_fp8_bound",
    ),
    "a base of bitsandbytes, of torchao, in FP8": (
        REFUSED,
        "test_dialects_refused.py::test_a_bitsandbytes_base_is_refused "
        "passes/test_match_refused.py::test_a_quantized_base_is_refused "
        "passes/test_match_refused.py::test_an_fp8_base_is_refused "
        "test_warnings.py::test_a_quantized_base_is_rejected_and_left_alone "
        "test_quantized_bases.py::test_explain_names_them "
        "test_quantized_bases.py::test_training_is_bit_for_bit_that_of_another_backend "
        "test_quantized_bases.py::test_prepare_leaves_them",
    ),
}

SITUATIONS: dict[str, str] = {
    "autocast": "test_precision.py::test_autocast_trains_bit_for_bit_as_eager "
    "test_precision.py::test_autocast_is_exact_arithmetic_within_the_casts",
    "float16 with GradScaler": (
        "test_precision.py::test_float16_with_a_grad_scaler_trains_by_the_steps_that_were_taken "
        "test_backend.py::test_a_step_that_gradscaler_skips_writes_nothing"
    ),
    "gradient accumulation": (
        "test_backend.py::test_gradient_accumulation_and_evaluation_write_once "
        "test_training_steps.py::test_accumulated_gradients_are_the_sum_of_those_of_the_parts"
    ),
    "activation checkpointing, reentrant and not": (
        "test_backend.py::test_checkpoint_recomputation_writes_nothing_and_changes_nothing "
        "test_regressions.py::test_the_first_call_inside_a_checkpoint"
    ),
    "dynamic shapes": "test_loops.py::test_batches_and_lengths_that_change_train_as_in_eager "
    "test_situations.py::test_dynamic_shapes_need_one_graph",
    "graph breaks": "test_situations.py::test_a_graph_break_between_sites",
    "train, eval, no_grad, inference_mode": (
        "test_situations.py::test_recompiles_for_shapes_and_modes_cast_each_weight_once "
        "test_situations.py::test_the_first_call_may_be_in_inference_mode "
        "test_sequences.py::TestTraining test_sequences.py::TestRows"
    ),
    "generate with a KV cache": (
        "test_special_inputs.py::test_generate_with_a_kv_cache_gives_the_tokens_of_the_emulation "
        "test_loops.py::"
        "test_generate_with_the_whole_model_compiled_gives_the_tokens_of_the_emulation"
    ),
    "weight tying": "test_loops.py::test_two_adapters_on_one_tied_base_weight_train_as_on_two "
    "test_regressions.py::test_sites_on_a_tied_base_weight_have_the_paths_of_their_adapters "
    "test_prepare_errors.py::test_a_tied_weight_is_refused",
    "two models in one process": "test_situations.py::test_two_models_in_one_process_do_not_mix",
    "one model compiled twice": (
        "test_situations.py::test_a_model_compiled_twice_has_one_fp8_weight"
    ),
    "deepcopy, pickle": "test_loops.py::test_a_copy_of_a_model_compiled_in_place_trains_apart "
    "test_loops.py::test_a_pickled_wrapper_compiles_again "
    "test_situations.py::"
    "test_a_deepcopy_of_a_compiled_model_has_fp8_weights_of_its_own",
    ".to(device), .half()": "test_precision.py::"
    "test_a_cast_after_compile_goes_on_as_a_cast_before_it "
    "test_precision.py::test_a_cast_of_a_prepared_model_rounds_its_adapter_and_nothing_else "
    "test_precision.py::"
    "test_with_rows_a_cast_of_a_prepared_models_adapter_is_an_error_whose_remedy_works "
    "test_loops.py::test_a_model_moved_to_meta_after_compile_is_an_error_that_names_the_site",
    "a frozen or missing gradient of B": (
        "test_loops.py::test_a_frozen_adapter_counts_and_gets_no_gradient "
        "test_loops.py::test_a_frozen_b_whose_a_is_trained_trains_a_alone "
        "test_loops.py::test_a_site_that_a_step_does_not_use_is_left_alone"
    ),
    "an optimizer that replaces .data": "test_backend.py::test_a_replaced_data_tensor_is_seen "
    "test_backend.py::test_a_write_through_data_is_seen",
    "weight decay on B": "test_rows.py::test_weight_decay_on_b_is_a_change_like_any_other",
    "a module used twice": (
        "test_special_inputs.py::"
        "test_a_module_used_twice_in_one_forward_is_one_site_with_the_sum_of_both_gradients "
        "passes/test_rewrite.py::test_a_layer_called_twice_is_two_sites_on_one_base_and_one_cast"
    ),
    "non-contiguous inputs": (
        "test_loops.py::test_strided_inputs_have_the_gradients_of_contiguous_ones"
    ),
    "no tokens": (
        "test_loops.py::test_no_tokens_at_all_give_zero_gradients_and_write_nothing "
        "test_special_inputs.py::test_zero_tokens_and_strided_inputs"
    ),
    "sizes that are no multiples of 16": (
        "test_loops.py::test_inductor_trains_as_eager_where_no_size_is_a_multiple_of_16"
    ),
    "CUDA graphs": "test_loops.py::test_cuda_graphs_asked_for_on_cpu_change_nothing",
    "compiled autograd": "test_special_inputs.py::test_compiled_autograd",
    "fullgraph=True": "test_loops.py::test_fullgraph_trains_a_llama "
    "test_situations.py::test_fullgraph",
}


def names_in(path: Path) -> Iterator[str]:
    """The tests in a file, and classes that a state machine gave to pytest."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            yield node.name
        if isinstance(node, ast.Assign):
            named = (n for target in node.targets for n in ast.walk(target))
            yield from (n.id for n in named if isinstance(n, ast.Name))


NAMED = {**{name: tests for name, (_, tests) in DIALECTS.items()}, **SITUATIONS}


@pytest.mark.parametrize("pattern", NAMED)
def test_the_tests_that_speak_for_a_pattern_exist(pattern):
    for test in NAMED[pattern].split():
        file, _, name = test.partition("::")
        assert name.lower().startswith("test")
        assert name in names_in(TESTS / file), test
