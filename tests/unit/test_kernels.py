"""The golden data with other kernels of torch than this processor's, as other processors have them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
PARITY = [HERE / f"test_{name}.py" for name in ("generation", "images", "mllm", "mmdit", "pipeline", "sampling", "vae")]
# This folder's root must not be on sys.path, see tests/conftest.py.
RUN = "import sys; del sys.path[0]; import pytest; sys.exit(pytest.main())"


@pytest.mark.parametrize("kernels, onednn", [("default", "SSE41"), ("avx2", "AVX2")])
def test_golden_data_hold_with_the_kernels_of_other_processors(kernels, onednn):
    """`default` is what torch has for every processor of a kind; `avx2` what those without AVX-512 run."""
    chosen = {"ATEN_CPU_CAPABILITY": kernels, "ONEDNN_MAX_CPU_ISA": onednn}
    told = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    line = [sys.executable, "-c"]
    got = subprocess.run([*line, told], env=os.environ | chosen, capture_output=True, text=True, check=True).stdout
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert (got.strip() == "AVX2") == (kernels == "avx2") and got.strip() != "AVX512"
    done = subprocess.run(
        [*line, RUN, "-q", "-p", "no:cacheprovider", "-k", "official and not command_line", *map(str, PARITY)],
        env=os.environ | chosen,
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:]
