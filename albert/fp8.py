"""Matrix products in 8-bit floating point, forward and both of the backward pass: the only importer of torchao.

Row-wise scaling: each row of the left factor and each column of the right one has a scale of its own, a power of two.
With one scale per tensor, which is faster, one outlier would cost all others their digits, and the result of a token
would depend on which others share its micro-batch. With row-wise scales it does not; only the gradient of a weight,
which sums over the tokens, is scaled over the micro-batch. All factors are e4m3, all products come out in 16 bits.

torchao's public way in replaces modules, and the joined projection of queries, keys and values is no module, so its
autograd function is used by itself. It is not public: torchao is pinned and tests/unit/test_fp8.py guards it.
"""

from __future__ import annotations

import logging
from typing import Any, Literal, cast

import torch
from torch import Tensor

from albert.errors import ConfigError
from albert.linear import Product

COMPILE_OPTIONS: dict[str, Any] = {"options": {"emulate_precision_casts": True}}
"""For `torch.compile`. What backward computes again must round as forward did, or scales and values disagree
(pytorch/pytorch#150859)."""
_FIRST_CAPABILITY = (8, 9)


def fp8_product(
    mode: Literal["on", "emulated"], device: torch.device, *, is_compiled: bool = False
) -> Product:
    """A function like `albert.linear.linear` that rounds its factors to float8.

    The sizes of features have to be multiples of 16, which `albert.config` checks; the number of tokens is free.

    Args:
        mode: `emulated` multiplies the rounded factors in fp32, on any device: slow, but the same up to the order of
            the sums.
        device: that the model is on.
        is_compiled: whether the model's layers will be.

    Raises:
        ConfigError: the device does not compute in float8, torchao is missing, or the compiler errs.
    """
    if mode == "on":
        _check_device(device)
    if is_compiled and device.type == "cpu":
        # torch 2.13 interleaves query, key and value of the last layer, and the attention of a CPU misreads them.
        raise ConfigError(
            f"train.compile (on) with train.fp8 ({mode}) gives wrong results on a CPU; use train.compile=off"
        )
    try:
        return _build_product(is_emulated=mode == "emulated")
    except ImportError as error:
        raise ConfigError(
            f"train.fp8 ({mode}): torchao cannot be imported ({error}); run pip install 'albert-pretraining[fp8]', "
            "or use train.fp8=off"
        ) from None


def has_fp8(device: torch.device) -> bool:
    """Whether a device computes in float8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FIRST_CAPABILITY


def _check_device(device: torch.device) -> None:
    if has_fp8(device):
        return
    name = "a CPU"
    if device.type == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        name = f"{torch.cuda.get_device_name(device)} (compute capability {capability})"
    raise ConfigError(
        f"train.fp8 (on): {name} does not compute in float8; use a GPU of compute capability 8.9 or later, "
        "train.fp8=off, or train.fp8=emulated to try it out, slowly"
    )


def _build_product(is_emulated: bool) -> Product:
    disabled_before = logging.root.manager.disable
    # torchao speaks of libraries for other machines, and of what other versions of torch will do.
    logging.disable(logging.WARNING)
    try:
        from torchao.float8 import (
            Float8LinearConfig,
            Float8LinearRecipeName,
            LinearMMConfig,
            ScaledMMConfig,
            convert_to_float8_training,
        )
        from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
    finally:
        logging.disable(disabled_before)

    convert_to_float8_training(torch.nn.Identity())  # converts nothing, but prepares the compiler
    recipe = Float8LinearConfig.from_recipe_name(Float8LinearRecipeName.ROWWISE)
    products = (recipe.gemm_config_output, recipe.gemm_config_grad_input, recipe.gemm_config_grad_weight)
    # The gradient of a weight sums over the tokens, whose number is padded to what the kernels take.
    kernels = LinearMMConfig(
        *(
            ScaledMMConfig(is_emulated, each.use_fast_accum, fp8_output=False, pad_inner_dim=True)
            for each in products
        )
    )

    def product(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return cast(Tensor, matmul_with_hp_or_float8_args.apply(rows, weight.t(), kernels, recipe)) + bias

    return product
