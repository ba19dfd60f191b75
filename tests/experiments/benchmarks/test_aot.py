"""What compilers say of programs for absent devices, read off pieces of their output."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from experiments.benchmarks.aot import bundles, gpu, nvcc, page, rows, steps
from experiments.benchmarks.aot.statistics import counts, shape_bytes, uncounted_bytes

# Lines of a program compiled for v5p:4x4x4, and of one with Pallas kernels, made shorter.
PROGRAM = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[64,128]{1,0:T(8,128)})}

ENTRY %main.7 (w.1: f32[64,128]) -> f32[64,128] {
  %w.1 = f32[64,128]{1,0:T(8,128)} parameter(0), metadata={op_name="w"}
  %kept.1 = pred[64,128]{1,0:T(8,128)(4,1)} custom-call(%w.1), custom_call_target="tpu_custom_call"
  %twice.1 = f32[64,128]{1,0:T(8,128)} custom-call(%w.1), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"cost_estimate":{"flops":"1"}}}
  %all-gather-start.1 = (f32[64,128]{1,0}, f32[512,128]{1,0}) all-gather-start(%twice.1), \
metadata={op_name="jit(step)/convert_element_type"}
  %all-gather-done.1 = f32[512,128]{1,0} all-gather-done(%all-gather-start.1)
  %collective-permute.4 = s32[128,512]{1,0:T(8,128)} collective-permute(%w.1), \
metadata={op_name="jit(step)/rematted_computation/add"}
  %copy.3 = f32[64,128]{0,1:T(8,128)} copy(%w.1)
  %copy-start.3 = (f32[64,128], f32[64,128]{1,0:T(8,128)S(1)}, u32[]) copy-start(%w.1)
  %copy-done.3 = f32[64,128]{1,0:T(8,128)S(1)} copy-done(%copy-start.3)
  ROOT %fusion.1 = f32[64,128]{1,0:T(8,128)} fusion(%copy-done.3, %kept.1), kind=kLoop
}
"""

# The schedule of a kernel with a grid of 16 x 8 steps and a loop of 32 in each, for v5e: the lines
# that begin and end loops, and the last one.
SCHEDULE = """\
= control target key start
LB: loop body
= control target key end

     0   :  { %6 = vsyncpa [#allocation3], 0 }
   0x7 LB: > { %s304_s14 = sadd.s32 4294967295, %s563_s13 /* iteration index, stage = 1 */ }
  0x21   : > { %130 = sbr.rel (%p127_p4) target = $region24 }
  0x28 LB: >> { %s316_s17 = sshll.u32 %s567_s16, 3 }
  0x29   : >> { %p162_p3 = scmp.ge.s32.totalorder %s165_s16, 32 /* loop exit test */ }
  0x2e   : >> { %v7 = vmul.f32 2.0, %v6  ;;  %164 = sbr.rel (!%p162_p3) target = $region78 }
  0x41   : > { %p14_p4 = scmp.ge.s32.totalorder %s17_s13, 130 /* loop exit test */ }
  0x44   : > { %16 = sbr.rel (!%p14_p4) target = $region89 }
  0x4c   :  { %231 = vsyncpa [#allocation4 + $0x1], 1 } /* exit bundle: %twice.1 */
"""


def test_counts_of_a_program():
    found = counts(PROGRAM)
    assert found["collectives"] == {"all-gather": 1, "collective-permute": 1}
    assert found["collective_names"]["collective-permute"] == [
        "s32[128,512] jit(step)/rematted_computation/add"
    ]
    assert (found["copies"], found["prefetches"], found["fusions"]) == (1, 1, 1)
    assert found["kernels"] == {"tpu_custom_call": 2}


def test_bytes_of_kernels_without_a_cost():
    # One float32 in and one boolean out for each entry; the other kernel states its cost.
    assert uncounted_bytes(PROGRAM) == 64 * 128 * (4 + 1)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("f32[8,128]{1,0:T(8,128)}", 4096),
        ("(bf16[3]{0}, pred[5], u32[])", 6 + 5 + 4),
        ("s4[3,3]", 5),
        ("f8e4m3fn[7]", 7),
    ],
)
def test_bytes_of_shapes(text, size):
    assert shape_bytes(text) == size


def test_loops_of_a_schedule_count_their_trips():
    # 130 times the 66 bundles of the grid's loop, which end 4 behind the branch; in each, 32 times
    # the 11 bundles of the inner loop; once the 11 others.
    outer, inner = 0x44 + 4 - 0x7 + 1, 0x2E + 4 - 0x28 + 1
    cycles = 0x4D - outer + 130 * (outer - inner + 32 * inner)
    assert bundles.schedule(SCHEDULE) == (0x4D, cycles)


def test_the_test_of_an_outer_loop_may_stand_in_an_inner_one():
    text = """\
     0   :  { %6 = vsyncpa [#allocation3], 0 }
  0x10 LB: > { %s26 = sphi %s3006, %s162 }
  0x20 LB: >> { %s21 = sphi %s1845, %s234 }
  0x21   : >> { %p231 = scmp.ge.s32.totalorder %s234, 2 /* loop exit test */ }
  0x22   : > { %p159 = scmp.ge.s32.totalorder (%p231), %s162, 16 /* loop exit test */ }
  0x2b   : >> { %233 = sbr.rel (!%p231) target = $region93 }
  0x3b   : > { %161 = sbr.rel (!%p159) target = $region104 }
  0x4f   :  { %8 = vsyncpa [#allocation3], 1 }
"""
    assert bundles.schedule(text) == (80, 32 + 16 * (32 + 2 * 16))


def test_an_unrolled_loop_counts_in_larger_steps():
    # From 2:4 along the inputs in float32: 64 steps of the loop in `fori_loop(..., unroll=8)`.
    text = """\
  0x27 LB: >> { %s162_s26 = sadd.s32 8, %s1974_s26  ;;  %s1974_s26 = sphi %s2095_s26, %s162_s26 }
  0x2f   : >> { %p159_p3 = scmp.ge.s32.totalorder %s162_s26, 64 /* loop exit test */ }
  0xd8   : >> { %161 = sbr.rel (!%p159_p3) target = $region146 }
  0xef   :  { %8 = vsyncpa [#allocation3], 1 }
"""
    once, body = 0xF0, 0xD8 + 4 - 0x27 + 1
    assert bundles.schedule(text) == (once, once + 7 * body)


def test_a_loop_without_trips_has_no_estimate():
    text = SCHEDULE.replace(", 32 /* loop", ", %s9 /* loop")
    with pytest.raises(NotImplementedError, match="loop at bundle 0x"):
        bundles.schedule(text)


def test_an_estimate_takes_the_larger_time():
    kernel = bundles.Kernel("mask.1", 100, 1_500_000)
    found = bundles.estimate([kernel, kernel], int(819e9 * 1e-3), "v5e")
    assert found["compute_us"] == pytest.approx(2000)
    assert found["compute_over_bytes"] == pytest.approx(2)
    assert found["estimate_us"] == pytest.approx(2000)
    assert bundles.estimate([kernel], 819_000_000 * 9, "v5e")["estimate_us"] == pytest.approx(9000)


def test_kernels_are_read_from_files(tmp_path):
    (tmp_path / "179-mask.1-70-schedule-analysis_final_bundles.txt").write_text("total: 3")
    (tmp_path / "179-mask.1-71-final_bundles.txt").write_text(SCHEDULE)
    (tmp_path / "178-<late-finalization>-68-final_bundles.txt").write_text(SCHEDULE)
    (found,) = bundles.kernels(tmp_path)
    assert (found.name, found.bundles) == ("mask.1", 0x4D)
    with bundles.dumped(tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_launches_of_a_gpu_program():
    text = """\
%fused (p: f32[8,4]) -> f32[8,4] {
  ROOT %copy.9 = f32[8,4]{1,0} copy(%p)
}
ENTRY %main (w.1: f32[8,4]) -> f32[8,4] {
  %w.1 = f32[8,4]{1,0} parameter(0)
  %both = (pred[8,4]{1,0}, u32[2,4]{1,0}) fusion(%w.1), kind=kLoop, calls=%fused
  %bits = u32[2,4]{1,0} get-tuple-element(%both), index=1
  ROOT %out = f32[8,4]{1,0} fusion(%w.1, %bits), kind=kLoop, calls=%fused
}
"""
    w, kept, bits = 8 * 4 * 4, 8 * 4, 2 * 4 * 4
    assert gpu.launches(text) == (2, (w + kept + bits) + (w + bits + w))


def test_rows_are_kept(tmp_path, capsys):
    calls = []

    def refuse():
        raise NotImplementedError("no such unit\nat all")

    def number():
        calls.append(1)
        return {"ratio": 1.5}

    table = [rows.Row("masks/v5e/2:4", number), rows.Row("masks/v6e/2:4", refuse)]
    rows.compute(rows.chosen(table, ["v5e", "2:4"]), tmp_path)
    rows.compute(table, tmp_path)
    assert len(calls) == 1
    rows.compute(table[:1], tmp_path, again=True)
    assert len(calls) == 2
    first, second = rows.collect(tmp_path)
    assert (first["key"], first["ratio"]) == ("masks/v5e/2:4", 1.5)
    assert second["refused"] == "no such unit"
    earlier = [{"key": "gpu/2:4", "kernels": 1}, {"key": "masks/v5e/2:4", "ratio": 14.0}]
    assert rows.collect(tmp_path, earlier) == [earlier[0], first, second]
    assert "[1/1] masks/v5e/2:4: ratio 1.5" in capsys.readouterr().out


def test_steps_stand_beside_their_dense_step():
    dense = {"bytes_accessed": 100, "peak": 50, "copies": 9, "collectives": {"all-reduce": 17}}
    more = {"all-reduce": 17, "collective-permute": 8}
    sparse = {"bytes_accessed": 101, "peak": 49, "copies": 134, "collectives": more}
    here = "steps/7b/v5p:4x4x4/data=8,model=8"
    found = {
        f"{here}/remat/dense": dense,
        f"{here}/remat/2:4/sr-ste": sparse,
        f"{here}/no-remat/2:4/sr-ste": sparse,
        f"{here}/no-remat/dense": {"refused": "Ran out of memory"},
    }
    (row,) = steps.beside_dense(found)
    assert row["key"] == f"{here}/remat/2:4/sr-ste"
    assert row["collectives_added"] == {"collective-permute": 8}
    assert (row["copies_added"], row["bytes"], row["peak"]) == (125, 1.01, 0.98)
    table = page.tables([{"key": key, **row} for key, row in found.items()])
    assert "| collective-permute +8 | +125 | 1.0100 | 0.9800 |" in table


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_row_compiled_for_a_tpu(tmp_path):
    command = [sys.executable, "-m", "experiments.benchmarks.aot", "--section", "masks"]
    only = ["--only", "v5e/1:16/float32/-2/apply/nmjax", "--kept", str(tmp_path)]
    # Tests compile without most of XLA's optimizations.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    subprocess.run([*command, *only], check=True, env=environment)
    (row,) = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    # A compiler that counted fewer bytes than one read and one write would have missed some.
    assert 0.99 < row["bytes_over_least"] < 6
    assert row["temporaries_MiB"] == 0


def test_a_report_of_nvcc():
    name = "_ZN5nmjax13decode_kernelINS_41_GLOBAL__N__e366bf80_9_decode_cu_7b0ea238{}EEvPKtl"
    text = "".join(
        f"ptxas info    : Compiling entry function '{name.format(arguments)}' for 'sm_90'\n"
        f"ptxas info    : Function properties for {name.format(arguments)}\n"
        f"    0 bytes stack frame, {spilled} bytes spill stores, 4 bytes spill loads\n"
        f"ptxas info    : Used {registers} registers, used 1 barriers, 16448 bytes smem\n"
        for arguments, spilled, registers in [
            ("4Bf16ELi8ELi1ELi8Ea", 8, 72),
            ("3F16ELi8ELi8ELi4Et", 0, 222),
        ]
    )
    found = nvcc.parsed(text)
    assert found.keys() == {("int8", 8, 8), ("f16", 8, 64)}
    # 72 registers: 9 units of 256 a warp, so 3 blocks of 8 warps, 24 of 64 warps.
    assert found["int8", 8, 8] == {
        "registers": 72,
        "spilled_bytes": 12,
        "shared_bytes": 16448,
        "occupancy": 0.375,
    }
    assert found["f16", 8, 64]["occupancy"] == 0.125


def test_occupancy_is_limited_by_shared_memory_and_blocks():
    assert nvcc.occupancy(registers=16, shared=100_000, warps=8) == 2 * 8 / 64
    assert nvcc.occupancy(registers=16, shared=0, warps=1) == 32 / 64


@pytest.mark.slow  # Half a minute.
def test_no_variant_of_the_decode_kernel_spills():
    try:
        found = nvcc.parsed(nvcc.report())
    except NotImplementedError:
        pytest.skip("no nvcc")
    assert len(found) == len(list(nvcc.rows()))
    assert not any(row["spilled_bytes"] for row in found.values())
    # Two blocks fit on a multiprocessor, of 4 warps or more.
    assert min(row["occupancy"] for row in found.values()) >= 2 * 4 / 64
