"""Whether the compiler for TPUs reads the positions of XLA's own 1:N sparsity.

Nothing in JAX can ask for that product, so the compiler gets it as HLO, through PJRT's C API.
"""

import importlib.util
import re
import subprocess
import sys

import pytest

# The functions of PJRT's C API stand behind a header of 40 bytes, in this order.
ERROR_MESSAGE, INITIALIZE, TOPOLOGY, COMPILE = 1, 3, 82, 89

PROGRAM = """
HloModule product

ENTRY product {
  x = f8e4m3fn[256,4096]{1,0} parameter(0)
  values = f8e4m3fn[1024,2048]{1,0} parameter(1)
  positions = u8[1024,2048]{1,0} parameter(2)
  ROOT y = f32[256,2048]{1,0} dot(x, values, positions), lhs_contracting_dims={1},
    rhs_contracting_dims={0},
    sparsity_config={rhs={sparsity=1x4 dimension=0 stride=1 idx=2}}
}
"""


def main(topology):
    """Compiles `PROGRAM`; runs in a process of its own, because the compiler may end it."""
    import ctypes

    import libtpu
    from jaxlib import _hlo, _jax

    library = ctypes.CDLL(libtpu.get_library_path())
    library.GetPjrtApi.restype = ctypes.c_void_p
    api = library.GetPjrtApi()

    def call(index, *fields):
        """Calls with a struct of words of 8 bytes; returns the struct."""
        words = (ctypes.c_uint64 * (len(fields) + 2))(8 * (len(fields) + 2), 0, *fields)
        address = ctypes.c_void_p.from_address(api + 40 + 8 * index).value
        function = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(address)
        if error := function(ctypes.addressof(words)):
            message = call(ERROR_MESSAGE, error, 0, 0)
            raise RuntimeError(ctypes.string_at(message[3], message[4]).decode())
        return words

    def text(content):
        buffer = ctypes.create_string_buffer(content, len(content))
        kept.append(buffer)
        return ctypes.addressof(buffer), len(content)

    kept = []
    call(INITIALIZE)
    device = call(TOPOLOGY, *text(topology.encode()), 0, 0, 0)[6]
    try:
        module = _hlo.hlo_module_from_text(PROGRAM).as_serialized_hlo_module_proto()
    except Exception as error:
        print("this jaxlib cannot parse it:", error)
        return
    program = (ctypes.c_uint64 * 6)(48, 0, *text(module), *text(b"hlo"))
    options = _jax.CompileOptions()
    options.num_replicas = options.num_partitions = 1
    settings = text(options.SerializeAsString())
    call(COMPILE, device, ctypes.addressof(program), *settings, 0, 0)
    print("compiled")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_the_compiler_does_not_read_the_positions_yet(tmp_path):
    environment = {
        "PATH": "",
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={tmp_path} --xla_jf_dump_llo_text=true",
    }
    run = subprocess.run(
        [sys.executable, __file__, "tpu7x:2x2x1"], env=environment, capture_output=True, text=True
    )
    if "cannot parse" in run.stdout:
        pytest.skip("this jaxlib's HLO has no sparse dot")
    assert "compiled" in run.stdout, run.stdout + run.stderr[-2000:]
    (schedule,) = (
        text
        for file in tmp_path.glob("*final_bundles.txt")
        if "schedule-analysis" not in file.name
        and "shape: u8[1024,2048], index: 2" in (text := file.read_text(errors="replace"))
    )
    x, values, positions = (loads(schedule, operand) for operand in range(3))
    assert x > 0
    assert values > 0
    # Once this fails, `nmjax.kernels.tpu.xla_sparsity` is ready for a product.
    assert positions == 0


def loads(schedule, operand):
    """How often a kernel loads registers from an operand, or from its copy in local memory."""
    (name, memory), *_ = re.findall(
        rf"%(\w+) = inlined_call_operand\.(\w+) \[shape: [^ ]*, index: {operand}, ", schedule
    )
    place = "%" + name
    if memory == "hbm":
        # The bundle that computes the address of the copy's source names the copy's buffer.
        (bundle,) = (line for line in schedule.splitlines() if f"scalar_lea.hbm %{name}," in line)
        place = re.search(r"smov \[(#allocation\d+)\]", bundle)[1]
    return len(re.findall(rf"vld\S* \[vmem:\[{place}\b", schedule))


if __name__ == "__main__":
    main(sys.argv[1])
