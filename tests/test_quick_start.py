"""What the commands do not import before the model's first forward pass, and what a quick start leaves behind."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

import ttd_plugins
from ttd_plugins.utils.allocator import keep_freed_memory
from ttd_plugins.utils.quick_start import collection_paused

PHOTOGRAPH = min((Path(ttd_plugins.__file__).parent / "embedded" / "photographs" / "images").glob("*.jpg"))
# None of these is needed to load open_clip:photo and to encode an image: the compiler and what it imports, libraries of
# other commands, and parts of torch that take long.
NOT_NEEDED = (
    "torch._dynamo", "torch._inductor", "torch._functorch.aot_autograd", "sympy", "mpmath", "triton", "pandas", "scipy",
    "sklearn", "matplotlib", "gradio", "datasets", "peft", "torchmetrics", "pyarrow", "stanza", "spacy", "nltk",
    "lightning", "accelerate", "tensorboard", "wandb",
)  # fmt: skip
MODULES_AT_FIRST_FORWARD = """
import sys
from ttd_plugins.cli import image_maps, main
load = image_maps.load_backbone
def watched(*names, **options):
    adapter = load(*names, **options)
    def report(*_):
        if handles:
            print("modules:", *sorted(sys.modules), file=sys.stderr)
            for handle in handles: handle.remove()
            handles.clear()
    handles = [module.register_forward_pre_hook(report) for module in adapter.model.modules()]
    return adapter
image_maps.load_backbone = watched
main(sys.argv[1:])
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(
    "arguments",
    [
        ["tags", str(PHOTOGRAPH), "a dog on the grass"],
        ["tags", str(PHOTOGRAPH), "--vocabulary", "dog, grass"],
        ["heatmap", str(PHOTOGRAPH), "a dog", "--out", "{folder}/maps.png"],
        ["segment", str(PHOTOGRAPH), "dog, grass", "--out", "{folder}/segments", "--size", "128", "--fast"],
    ],
    ids=["tags", "vocabulary", "heatmap", "segment"],
)
def test_commands_start_without_what_they_do_not_need(arguments: list[str], tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    done = run(MODULES_AT_FIRST_FORWARD, *(part.format(folder=tmp_path) for part in arguments))
    line = next(line for line in done.stderr.splitlines() if line.startswith("modules:"))
    imported = set(line.split()[1:])
    assert {"torch", "open_clip", "timm"} <= imported
    assert not imported & set(NOT_NEEDED)


def test_listing_commands_do_not_import_torch() -> None:
    code = "import sys; from ttd_plugins.cli import app; assert 'torch' not in sys.modules, 'torch'"
    run(code)


def test_the_compiler_works_after_a_deferred_import() -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    code = """
import sys, types
import torch
from ttd_plugins.utils.quick_start import compiler_deferred
own = torch.compiler.disable
with compiler_deferred():
    import torchvision, timm
    disabled = torch.compiler.disable(lambda x: x + 1)
assert "torch._dynamo" not in sys.modules and "torch._dynamo.utils" not in sys.modules
assert torch.compiler.disable is own
assert disabled(1) == 2
assert "torch._dynamo" not in sys.modules
# The operator that needs the function of the compiler imports it.
boxes = [torch.tensor([[0.0, 0.0, 4.0, 4.0]])]
assert torchvision.ops.roi_align(torch.ones(1, 3, 8, 8), boxes, 2).shape == (1, 3, 2, 2)
import torch._dynamo
assert torchvision.ops.roi_align.__module__ == "torchvision.ops.roi_align"
assert isinstance(torch._dynamo.utils.is_compile_supported, types.FunctionType)
graphs = []
def backend(graph, inputs):
    graphs.append(graph)
    return graph.forward
compiled = torch.compile(lambda x: disabled(x.sin()).cos(), backend=backend)
x = torch.ones(3)
assert torch.allclose(compiled(x), (x.sin() + 1).cos())
# Excluded from compilation: the sum is in no graph.
names = [node.target for graph in graphs for node in graph.graph.nodes if node.op.startswith("call")]
assert len(graphs) == 2 and not any("add" in str(name) for name in names), names
"""
    run(code)


def test_another_import_of_the_compiler_gets_the_module_itself() -> None:
    code = """
import sys
import torch
from ttd_plugins.utils.quick_start import compiler_deferred
with compiler_deferred():
    placeholder = sys.modules["torch._dynamo.utils"]
    from torch._dynamo.utils import counters
    import torch._dynamo
assert sys.modules["torch._dynamo.utils"] is not placeholder
assert torch._dynamo.utils.counters is counters
with compiler_deferred():
    assert torch._dynamo.utils.counters is counters
"""
    run(code)


def test_an_error_during_a_deferred_import_leaves_nothing_behind() -> None:
    code = """
import sys
import torch
from ttd_plugins.utils.quick_start import compiler_deferred
own = torch.compiler.disable
try:
    with compiler_deferred():
        raise RuntimeError
except RuntimeError:
    pass
assert torch.compiler.disable is own and "torch._dynamo.utils" not in sys.modules
"""
    run(code)


# The collector -------------------------------------------------------------------------------------------------------


def test_the_collector_resumes_only_if_it_was_on() -> None:
    assert gc.isenabled()
    with collection_paused():
        with collection_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with collection_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_collector_resumes_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="inside"), collection_paused():
        raise RuntimeError("inside")
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_garbage_from_the_block_is_collected_later() -> None:
    class Node:
        alive = 0

        def __init__(self) -> None:
            Node.alive += 1
            self.itself = self

        def __del__(self) -> None:
            Node.alive -= 1

    with collection_paused():
        Node()
    assert Node.alive == 1
    gc.collect()
    assert Node.alive == 0


def test_objects_that_the_program_froze_stay_frozen() -> None:
    run(
        "import gc; from ttd_plugins.utils.quick_start import collection_paused\n"
        "gc.freeze(); count = gc.get_freeze_count()\n"
        "with collection_paused(): kept = [[] for _ in range(1000)]\n"
        "assert gc.get_freeze_count() == count > 0"
    )


# The allocator -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the settings are those of glibc")
def test_freed_memory_of_a_tensor_is_used_again() -> None:
    code = """
import resource, sys
import torch
from ttd_plugins.utils.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(10 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""
    default = int(run(code, "default").stdout)
    # The system chooses the layout of each process at random, and in a few the heap has no room to grow.
    kept = (int(run(code, "kept").stdout) for _ in range(5))
    # 40 MiB are 10,240 pages of 4 KiB, or 20 of 2 MiB.
    assert any(faults <= default / 4 for faults in kept)


def test_other_systems_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
