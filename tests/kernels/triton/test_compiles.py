"""What cannot be interpreted compiles for Hopper, within its memory and without spilling."""

from __future__ import annotations

import json
import os
import subprocess
import sys

# Bytes of shared memory that a program may have.
SHARED = 232448


def test_products_compile_for_hopper() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.triton.compile_for_hopper"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    kernels = json.loads(result.stdout.splitlines()[-1])
    names = ("_product_kernel", "_hopper_kernel", "_pairs_kernel")
    products = [k for k in kernels if k["name"] in names]
    assert len(products) == 12
    for kernel in products:
        assert kernel["fp8"], kernel
        assert kernel["stack"] == 0, kernel
        assert not kernel["serial"], kernel
        assert kernel["shared"] <= SHARED, kernel
    # 6 x 17 tiles of 192 x 128.
    assert products[0]["grid"] == [102]
    attention = [k for k in kernels if k["name"] == "hopper_attend_kernel"]
    assert len(attention) == 3
    for kernel in attention:
        # A few addresses, read once for 64 keys.
        assert kernel["stack"] <= 96, kernel
        assert kernel["shared"] <= SHARED, kernel
    # The 16 tiles that 4 rounds leave are added up apart.
    assert [k["grid"] for k in kernels if k["name"] == "_tail_kernel"] == [[16, 8]] * 2
