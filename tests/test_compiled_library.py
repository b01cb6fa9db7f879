"""The file of the compiled library, and which backend serves each op on each device.

Calls with CUDA tensors are calls with CPU tensors that are redispatched to the CUDA key.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import stamp_kernels
from stamp_kernels.ops._library import TRITON_LAUNCHERS, served_by

PACKAGE = Path(stamp_kernels.__file__).parent
TORCH_SYMBOLS = Path(__file__).parent / "torch_symbols.txt"
# Symbols with these versions need no look-up: every system that torch runs on has their libraries.
SYSTEM_VERSIONS = ("GLIBC_", "GLIBCXX_", "CXXABI_", "GCC_")


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not on PATH")
    return path


def unresolved_symbols(library: Path) -> list[str]:
    """Undefined symbols that are not in the oldest torch."""
    lines = TORCH_SYMBOLS.read_text().splitlines()
    exported = {line for line in lines if line and not line.startswith("#")}
    command = [tool("nm"), "-D", "--undefined-only", str(library)]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    strong = (symbol.partition("@") for kind, symbol in map(str.split, listed.splitlines()) if kind == "U")
    return [
        name
        for name, _, version in strong
        if name not in exported and not version.lstrip("@").startswith(SYSTEM_VERSIONS)
    ]


def test_symbols_of_the_library_are_in_torch():
    assert unresolved_symbols(PACKAGE / "_cpu.so") == []


def test_other_symbols_are_unresolved(tmp_path):
    source = tmp_path / "other.cpp"
    source.write_text('extern "C" int aoti_torch_other(); int f() { return aoti_torch_other(); }')
    library = tmp_path / "other.so"
    subprocess.run([tool("c++"), "-shared", "-fPIC", source, "-o", library], check=True)
    assert unresolved_symbols(library) == ["aoti_torch_other"]


def test_every_op_is_served():
    names = {op._schema.name.removeprefix("stamp::") for op in TRITON_LAUNCHERS}
    assert len(names) == 13
    # Kernels for the CPU need no tile list.
    assert served_by("CPU") == dict.fromkeys(sorted(names), "compiled") | {"tile_list": "reference"}
    assert served_by("CUDA") == dict.fromkeys(sorted(names), "triton")


def run_python(code: str) -> None:
    """Run the code in a process of its own with the same package."""
    run = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_cuda_tensors_reach_the_launcher_or_the_reference():
    run_python("""if True:
        import torch
        from stamp_kernels.ops import _library

        def define(name, **kernels):
            return _library.define_op(
                f"{name}(Tensor x) -> Tensor", check=lambda x: None, reference=lambda x: x + 1,
                fake=torch.empty_like, **kernels,
            )

        launched, without_launcher = define("first", triton=lambda x: x + 10), define("second")
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        x = torch.zeros(1)
        assert [int(op.redispatch(keys, x)) for op in (launched, without_launcher)] == [10, 1]
        assert [_library.served_by("CUDA")[name] for name in ("first", "second")] == ["triton", "reference"]
        with torch._subclasses.fake_tensor.FakeTensorMode():
            assert launched(torch.empty(3, device="cuda")).shape == (3,)
    """)


def test_missing_triton_is_named():
    run_python("""if True:
        import sys
        sys.modules["triton"] = None  # makes its import fail
        import torch, stamp_kernels
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        x = torch.zeros(1)
        try:
            torch.ops.stamp.shift_targets.default.redispatch(keys, x.long(), x.int(), 1, 1, -100)
        except ImportError as error:
            text = str(error)
        assert text.startswith(
            "stamp.shift_targets.default runs on Triton on a GPU, and Triton cannot be imported (import of triton "
        ), text
        assert text.endswith(
            "): install it with `pip install triton`, in the version that this torch was released with"
        ), text
    """)


def test_other_devices_are_refused():
    with pytest.raises(NotImplementedError, match=r"'stamp::prune' .* 'XPU' backend"):
        torch.ops.stamp.prune.default.redispatch(
            torch._C.DispatchKeySet(torch._C.DispatchKey.XPU),
            [torch.zeros(1, 1)], torch.zeros(1), None, torch.tensor([0, 1]), 1, 1, False, None, 1, None, 1, None, 1, 1,
        )  # fmt: skip
