"""The compiled CUDA library without a GPU: what its file needs and contains, and which backend serves CUDA.

Calls with CUDA tensors are calls with CPU tensors that are redispatched to the CUDA key. They run in processes of their
own, because each process chooses once.
"""

import re
import shutil
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import stamp_kernels
from stamp_kernels.ops import _cuda_library
from stamp_kernels.ops._cuda_library import CudaChoice, CudaFacts, choose_cuda_library, load_cuda_library
from stamp_kernels.ops._library import TRITON_LAUNCHERS, served_by

PACKAGE = Path(stamp_kernels.__file__).parent
TORCH_SYMBOLS = Path(__file__).parent / "cuda" / "torch_symbols.txt"
# Symbols with these versions need no look-up: every system that torch runs on has their libraries.
SYSTEM_VERSIONS = ("GLIBC_", "GLIBCXX_", "CXXABI_", "GCC_")


@pytest.fixture
def cuda_library() -> Path:
    libraries = sorted(PACKAGE.glob("_cuda[0-9]*.so"))
    if not libraries:
        pytest.skip("no CUDA library was built, because there is no nvcc or STAMP_KERNELS_CUDA=0")
    return libraries[-1]


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None and (triton := find_spec("triton")) is not None:
        path = shutil.which(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name)
    if path is None:
        pytest.skip(f"{name} is neither on PATH nor in Triton's wheel")
    return path


def output_of(*command: object) -> str:
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout


def run_python(code: str) -> None:
    """Run the code in a process of its own with the same package."""
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def needed_libraries(library: Path) -> set[str]:
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", output_of(tool("readelf"), "--dynamic", "--wide", library)))


def symbols_by_library() -> dict[str, set[str]]:
    """What the oldest CUDA build of torch exports, as in the committed file."""
    symbols: dict[str, set[str]] = {}
    for line in TORCH_SYMBOLS.read_text().splitlines():
        if line.startswith("["):
            of_library = symbols.setdefault(line.strip("[]"), set())
        elif line and not line.startswith("#"):
            of_library.add(line)
    return symbols


def unresolved_symbols(library: Path) -> list[str]:
    """Undefined symbols that none of the needed libraries has in the oldest CUDA build of torch."""
    needed = needed_libraries(library)
    exported = set().union(*(names for name, names in symbols_by_library().items() if name in needed))
    lines = (line.split() for line in output_of(tool("nm"), "-D", "--undefined-only", library).splitlines())
    strong = (symbol.partition("@") for kind, symbol in lines if kind == "U")
    return [
        name
        for name, _, version in strong
        if name not in exported and not version.lstrip("@").startswith(SYSTEM_VERSIONS)
    ]


def test_symbols_of_the_cpu_library_are_in_torch():
    assert unresolved_symbols(PACKAGE / "_cpu.so") == []


def test_symbols_of_the_cuda_library_are_in_torch(cuda_library):
    assert "libtorch_cuda.so" in needed_libraries(cuda_library)
    assert unresolved_symbols(cuda_library) == []


def test_symbol_of_an_unneeded_library_is_unresolved(tmp_path):
    """A CUDA library that does not name libtorch_cuda.so would fail to import although torch has loaded that."""
    source = (
        'extern "C" int aoti_torch_get_current_cuda_stream(); int f() { return aoti_torch_get_current_cuda_stream(); }'
    )
    (tmp_path / "uses_stream.cpp").write_text(source)
    library = tmp_path / "uses_stream.so"
    output_of(tool("c++"), "-shared", "-fPIC", tmp_path / "uses_stream.cpp", "-o", library)
    assert unresolved_symbols(library) == ["aoti_torch_get_current_cuda_stream"]


def test_cuda_library_has_code_for_every_gpu(cuda_library):
    """Machine code for three generations, and PTX that the driver compiles for later ones."""
    listed = {
        kind: re.findall(r"\.(sm_\d+)\.", output_of(tool("cuobjdump"), f"-l{kind}", cuda_library))
        for kind in ("elf", "ptx")
    }
    kernels = len(listed["ptx"])
    assert kernels > 0
    assert set(listed["ptx"]) == {"sm_100"}
    for architecture in ("sm_80", "sm_90", "sm_100"):
        assert listed["elf"].count(architecture) >= kernels


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA, so the library does not load")
def test_cuda_library_loads(cuda_library):
    code = f"import torch, stamp_kernels; torch.ops.load_library({str(cuda_library)!r})"
    run_python(code)


MODERN = ((8, 0), (9, 0))


@pytest.mark.parametrize(
    ("facts", "major"),
    [
        (CudaFacts("13.0", (13,), 13000, MODERN), 13),
        (CudaFacts("12.8", (12, 13), 12080, MODERN), 12),
        (CudaFacts("13.2", (13,), 13000, MODERN), 13),  # a driver serves later minor versions of its CUDA
        (CudaFacts("12.6", (12,), 13000, ((12, 0),)), 12),  # and earlier major versions
        (CudaFacts("13.0", (13,), None, ()), 13),  # no GPU here
        (CudaFacts("13.0", (), 13000, MODERN), None),
        (CudaFacts(None, (13,), None, ()), None),
    ],
)
def test_library_is_chosen_without_a_warning(facts, major):
    assert choose_cuda_library(facts) == CudaChoice(major)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (
            CudaFacts("12.8", (13,), 13000, MODERN),
            "it was built for CUDA 13, and torch for CUDA 12. Install a torch for CUDA 13, or build stamp_kernels with "
            "nvcc of CUDA 12 (`pip install --no-build-isolation .` in the sources)",
        ),
        (
            CudaFacts("13.0", (11, 12), 13000, MODERN),
            "it was built for CUDA 11 and 12, and torch for CUDA 13. Install a torch for CUDA 11 or 12, or build "
            "stamp_kernels with nvcc of CUDA 13 (`pip install --no-build-isolation .` in the sources)",
        ),
        (
            CudaFacts("13.0", (13,), 12080, MODERN),
            "it was built for CUDA 13, and the driver supports CUDA 12.8 at most. Update the driver",
        ),
        (
            CudaFacts("13.0", (13,), 13000, ((9, 0), (7, 5))),
            "it needs GPUs of compute capability 8.0 or higher, and a visible one has 7.5. If there are newer ones, "
            "make only them visible with CUDA_VISIBLE_DEVICES",
        ),
    ],
)
def test_reason_says_why_no_library_serves(facts, reason):
    assert choose_cuda_library(facts) == CudaChoice(None, reason)


def test_installed_libraries_are_known_by_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(_cuda_library, "_PACKAGE", tmp_path)
    for name in ("_cpu.so", "_cuda.so", "_cuda13.so", "_cuda12.so", "_cuda13.so.old"):
        (tmp_path / name).touch()
    assert _cuda_library.cuda_facts().built_for == (12, 13)


def test_library_that_does_not_load_gives_way(tmp_path, monkeypatch):
    monkeypatch.setattr(_cuda_library, "_PACKAGE", tmp_path)
    (tmp_path / "_cuda13.so").write_text("not a library")
    choice = load_cuda_library(CudaChoice(13))
    assert choice.major is None
    assert re.fullmatch(
        rf"{tmp_path}/_cuda13\.so could not be loaded: .*(header|short).*\. Build stamp_kernels again "
        r"\(`pip install --no-build-isolation \.` in the sources\)",
        choice.reason,
    )


# Three ops, and a stand-in for the compiled library that has a kernel for the first of them.
STAND_INS = """
    import sys, threading, warnings
    import torch
    from stamp_kernels.ops import _library
    from stamp_kernels.ops._cuda_library import CudaChoice

    def stand_in(name, **kernels):
        return _library.define_op(
            f"{name}(Tensor x) -> Tensor", check=lambda x: None, reference=lambda x: x + 1,
            fake=torch.empty_like, **kernels,
        )

    def on_cuda(op, *args):
        return op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args)

    def load(choice):
        loads.append(choice)
        if choice.major is not None:
            compiled.impl("first", lambda x: x + 100, "CUDA")
        return choice

    loads, compiled = [], torch.library.Library("stamp", "IMPL")
    _library.load_cuda_library = load
    ops = [stand_in("first", triton=lambda x: x + 10), stand_in("second", triton=lambda x: x + 10), stand_in("third")]
    x = torch.zeros(1)
    warnings.simplefilter("error")
"""


def run_with_stand_ins(choice: CudaChoice, code: str) -> None:
    decide = f"_library.choose_cuda_library = lambda facts: {choice!r}"
    script = "\n".join([textwrap.dedent(STAND_INS), decide, textwrap.dedent(code)])
    run_python(script)


def test_first_call_settles_who_serves():
    """The compiled library serves its ops, Triton the others, the reference the rest; later calls go there directly."""
    run_with_stand_ins(
        CudaChoice(13),
        """
        table = lambda: torch._C._dispatch_has_kernel_for_dispatch_key("stamp::first", "CUDA")
        assert not table() and not loads
        with torch._subclasses.fake_tensor.FakeTensorMode():
            assert ops[0](torch.empty(3, device="cuda")).shape == (3,)
        assert not table() and not loads
        for _ in range(2):
            assert [int(on_cuda(op, x)) for op in ops] == [100, 10, 1]
        assert table() and loads == [CudaChoice(13)]
        served = _library.served_by("CUDA")
        assert [served[name] for name in ("first", "second", "third")] == ["compiled", "triton", "reference"]
        late = stand_in("fourth", triton=lambda x: x + 20)
        assert int(on_cuda(late, x)) == 20
        assert _library.served_by("CUDA")["fourth"] == "triton" and len(loads) == 1
        """,
    )


def test_warning_comes_once_and_leaves_all_settled():
    run_with_stand_ins(
        CudaChoice(None, "it is too old"),
        """
        assert _library.served_by("CUDA")["first"] == "triton"
        try:
            on_cuda(ops[0], x)
        except RuntimeWarning as warning:
            assert str(warning) == "stamp_kernels runs on Triton, not in its compiled CUDA library: it is too old."
        else:
            raise AssertionError("no warning")
        assert [int(on_cuda(op, x)) for op in ops] == [10, 10, 1]
        """,
    )


def test_threads_settle_once():
    """Eight threads make the first call of every op and switch as often as Python lets them."""
    run_with_stand_ins(
        CudaChoice(13),
        """
        sys.setswitchinterval(1e-6)
        more = [stand_in(f"more{i}", triton=lambda x: x + 10) for i in range(100)]
        barrier, results = threading.Barrier(8), []

        def call_all():
            barrier.wait()
            results.append([int(on_cuda(op, x)) for op in (*ops, *more)])

        threads = [threading.Thread(target=call_all) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [[100, 10, 1] + [10] * 100] * 8
        assert len(loads) == 1
        """,
    )


def test_missing_triton_is_named():
    run_with_stand_ins(
        CudaChoice(None, "it is too old"),
        """
        sys.modules["triton"] = None  # makes its import fail
        warnings.simplefilter("ignore")
        try:
            on_cuda(torch.ops.stamp.shift_targets.default, x.long(), x.int(), 1, 1, -100)
        except ImportError as error:
            text = str(error)
        assert text.startswith(
            "stamp.shift_targets.default runs on Triton here, and Triton cannot be imported (import of triton halted"
        ), text
        assert text.endswith(
            "): install it with `pip install triton`, in the version that this torch was released with. "
            "The compiled CUDA library does not serve: it is too old"
        ), text
        """,
    )


def test_other_devices_are_refused():
    with pytest.raises(NotImplementedError, match=r"stamp.prune.default has kernels for dense CPU and .* none for XPU"):
        torch.ops.stamp.prune.default.redispatch(
            torch._C.DispatchKeySet(torch._C.DispatchKey.XPU),
            [torch.zeros(1, 1)], torch.zeros(1), None, torch.tensor([0, 1]), 1, 1, False, None, 1, None, 1, None, 1, 1,
        )  # fmt: skip


@pytest.mark.filterwarnings("error")
def test_every_op_is_served():
    names = {op._schema.name.removeprefix("stamp::") for op in TRITON_LAUNCHERS}
    assert len(names) == 12
    assert served_by("CPU") == dict.fromkeys(sorted(names), "compiled")
    on_cuda = served_by("CUDA")
    assert list(on_cuda) == sorted(names)
    assert set(on_cuda.values()) <= {"compiled", "triton"}
    assert on_cuda["packed_attention_forward"] == "triton"
