"""The bundle for a GPU machine: its Triton cache hits in the folder where it is unpacked."""

import json
import shutil
import sys

from gpu_scripts import SCRIPTS, run_script

sys.path.append(str(SCRIPTS))
from bundle import all_hits, relocate

COMPILE = """
import sys
sys.path.insert(0, {scripts!r})
import torch
from stamp_kernels.ops._served_by_triton import ServedByTriton
from stamp_kernels.triton_kernels.aot import compile_only
from workloads import ShiftTargets

shift = ShiftTargets("shift", lengths=(3, 2))
with compile_only(90) as launches, ServedByTriton():
    shift.run(shift.inputs(torch.device("meta"), torch.bfloat16))
print([launch.is_hit for launch in launches])
"""


def test_cache_hits_in_another_folder(tmp_path):
    """Triton lists absolute paths, so a moved cache hits only after `relocate`."""
    script = tmp_path / "compile.py"
    script.write_text(COMPILE.format(scripts=str(SCRIPTS)))

    def hits(cache: str) -> str:
        run = run_script(script, TRITON_CACHE_DIR=tmp_path / cache)
        assert run.returncode == 0, run.stderr
        return run.stdout.strip()

    assert hits("made") == "[False]"
    assert hits("made") == "[True]"
    shutil.move(tmp_path / "made", tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "not relocated")
    assert hits("not relocated") == "[False]"
    relocate(tmp_path / "moved")
    assert hits("moved") == "[True]"


def test_relocated_lists_name_only_existing_files(tmp_path):
    """In a cache with only binaries, the lists also name intermediate representations that were not stored."""
    kernel = tmp_path / "KEY"
    kernel.mkdir()
    (kernel / "k.cubin").write_bytes(b"machine code")
    group = kernel / "__grp__k.json"
    group.write_text(json.dumps({"child_paths": {"k.cubin": "/elsewhere/KEY/k.cubin", "k.ttir": "/elsewhere/k.ttir"}}))
    relocate(tmp_path)
    assert json.loads(group.read_text()) == {"child_paths": {"k.cubin": str(kernel / "k.cubin")}}


def test_compiled_key_does_not_count_as_hit():
    """A key that one entry compiled and a later one found was not in the cache at the start."""
    hits = all_hits([{"a": True, "b": False}, {"b": True}, {"a": True, "c": True}])
    assert hits == {"a": True, "b": False, "c": True}
