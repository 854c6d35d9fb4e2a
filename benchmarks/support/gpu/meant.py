"""The kernels for GPUs by the path that is meant to call them. A test finds who is on no list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# Of an FP8 training step: the operation, and the functions that a profile names.
STEP: Mapping[str, Sequence[str]] = {
    "attention": ("forward_kernel", "delta_kernel", "dq_kernel", "dkdv_kernel"),
    "quantisers": ("_tiles_kernel", "_blocks_kernel", "both_units_kernel"),
    "turning": ("turn_units_kernel", "regroup_units_kernel"),
    # Dense and grouped products are one kernel; segments need a table each, along K another.
    "products": ("_pairs_kernel", "_rows_kernel", "_groups_kernel"),
    "router": ("route_kernel", "route_backward_kernel"),
    "sort": ("_count_kernel", "_scan_kernel", "_place_kernel"),
    "dispatch": ("_permute_tiles_kernel",),
    "combine": ("_unpermute_kernel",),
    "expand": ("_expand_kernel", "_expand_backward_kernel"),
    "optimizer": ("_adamw_kernel",),
    "norm": ("_norm_kernel", "_norm_backward_kernel", "_norm_sum_kernel"),
    "SwiGLU": ("_swiglu_kernel", "again_units_kernel", "_swiglu_backward_kernel"),
    "kept output": ("_encode_words_kernel", "_decode_words_kernel"),
    "loss": ("cross_entropy_kernel",),
}
# Of answers alone.
ANSWER: Mapping[str, Sequence[str]] = {
    "latent": ("append_kernel", "turn_kernel", "hopper_attend_kernel", "merge_kernel"),
    "stored codes": ("_coded_row_kernel", "_coded_rows_kernel", "_decode_codes_kernel"),
}
# Of a served request, its prompt and its tokens, by the form of the checkpoint.
_ANY = (
    *ANSWER["latent"],
    *STEP["sort"],
    *STEP["combine"],
    "route_kernel",
    "_norm_kernel",
)
_INTEGERS = (*_ANY, "_coded_rows_kernel", "_decode_codes_kernel", "_permute_kernel")
SERVED: Mapping[str, Sequence[str]] = {
    "bf16": (*_ANY, "_permute_kernel"),
    "fp8": (
        *(*_ANY, *STEP["dispatch"], "_tiles_kernel", "_swiglu_kernel"),
        *("_product_kernel", "_rows_kernel"),
    ),
    "int8": (*_INTEGERS, "_coded_row_kernel"),
    "int4": _INTEGERS,
}
# What neither has, and why.
SELDOM: Mapping[str, str] = {
    "reach_kernel": "rows of several documents with pretrain's document mask",
    "_turn_kernel": "matrices of a width that is no multiple of 64, or in FP32",
    "_swiglu_turned_kernel": "the same of SwiGLU",
    "_hopper_kernel": "products whose tiles of 192 rows go round without a rest",
    "attend_kernel": "decode in FP32, of other widths than the published, and on other GPUs",
    "_tail_kernel": "products whose last round of tiles is nearly empty",
    "_product_kernel": "products of few rows, and GPUs that are no Hopper",
    "_sum_kernel": "products of few rows, whose sums several programs share",
    "grouped_rows_kernel": "experts of a training step in BF16, forward and their rows' gradients",
    "grouped_weights_kernel": "gradients of experts' weights in BF16",
    "_encode_e5m6_kernel": "outputs in FP32, or of a width that is no multiple of 128",
    "_decode_e5m6_kernel": "the same",
    "_permute_kernel": "dispatch in BF16, and the gradient of combining",
}
