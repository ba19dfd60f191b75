"""Which backends can multiply packed weights on this machine."""

from __future__ import annotations

from nmjax.kernels.cpu.library import load_library
from nmjax.kernels.gpu.cusparselt_library import load_cusparselt
from nmjax.kernels.gpu.decode_library import load_decode
from nmjax.kernels.tpu.devices import tpu_state


def backends() -> dict[str, str]:
    """Reports which backends can multiply packed weights here: name -> "ready", or why not.

    `"xla"` is plain XLA, which always works. `"ffi"` is the compiled kernels for CPUs. For 2:4
    weights on NVIDIA GPUs, `"cusparselt"` is NVIDIA's library, and `"decode"` a kernel for few
    rows. `"tpu"` is the kernels for TPUs, for products and for masks. Environment variables:
    `NMJAX_DISABLE_FFI` switches off the compiled ones for CPUs and GPUs, `NMJAX_KERNELS_LIBRARY`
    names another library file of CPU kernels, and `NMJAX_KERNELS_ISA` picks a narrower instruction
    set than the machine has.

    >>> sorted(backends())
    ['cusparselt', 'decode', 'ffi', 'tpu', 'xla']
    """
    library, nvidia = load_library(), load_cusparselt()
    return {
        "xla": "ready: unpacks, or gathers where that is faster",
        "ffi": library.reason or f"ready: {library.instruction_set}",
        "cusparselt": nvidia.reason or f"ready: {nvidia.version}",
        "decode": load_decode() or "ready",
        "tpu": tpu_state() or "ready: packed products, and masks in one pass",
    }
