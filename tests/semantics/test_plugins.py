"""Plugins: who lowers what, priorities and conditions, ties, switching off, and plugins that are broken."""

from __future__ import annotations

import functools
import os
import sys
import textwrap
import types
import warnings

import jax
import jax.numpy as jnp
import pytest
import torch
import torchax
from torchax import errors, plugins
from torchax.ops import Lowering, lowering, view_lowering

from helpers import run_python

MISSING_OP = "torchax_plugins::shifted"


@pytest.fixture(scope="module")
def ops():
    """A library of ops that nobody lowers until a test's plugin does."""
    lib = torch.library.Library("torchax_plugins", "DEF")
    lib.define("shifted(Tensor x, float by=1.0) -> Tensor")
    lib.define("shifted_(Tensor(a!) x, float by=1.0) -> Tensor(a!)")
    lib.define("shifted.out(Tensor x, float by=1.0, *, Tensor(a!) out) -> Tensor(a!)")
    lib.impl("shifted", lambda x, by=1.0: torch.empty_like(x), "Meta")
    lib.impl("shifted_", lambda x, by=1.0: x, "Meta")
    yield torch.ops.torchax_plugins
    lib._destroy()


@pytest.fixture
def load():
    """``load(name, lowerings...)`` registers a plugin object; all are gone when the test ends."""
    names = []

    def register(name, *lowerings, info=None, hooks=None):
        class Plugin:
            @plugins.hookimpl
            def torchax_register_ops(self, registry):
                for entry in lowerings:
                    registry.add(entry)

            @plugins.hookimpl
            def torchax_plugin_info(self):
                return info or {
                    "name": name,
                    "version": "1",
                    "api": plugins.API_VERSION,
                    "summary": "for a test",
                    "url": "",
                }

        for key, value in (hooks or {}).items():
            setattr(Plugin, key, plugins.hookimpl(value))
        names.append(name)
        plugins.register(Plugin(), name)
        return Plugin

    yield register
    for name in names:
        if any(p.name == name for p in plugins.status()):
            plugins.disable(name)
            plugins._found.pop(name)
            plugins._objects.pop(name, None)


def shift(extra=0.0, **attributes):
    return Lowering(op=MISSING_OP, fn=lambda x, by=1.0: x + by + extra, **attributes)


def ones():
    return torch.ones(2, device="jax")


def test_a_plugin_serves_an_op_and_its_forms_follow(ops, load):
    with pytest.raises(errors.OperatorNotFound):
        ops.shifted(ones())
    load("shifts", shift())
    x = ones()
    assert ops.shifted(x).tolist() == [2, 2] and ops.shifted(x, 3.0).tolist() == [4, 4]
    assert ops.shifted_(x[1:], 2.0).tolist() == [3] and x.tolist() == [1, 3]
    out = torch.empty(0, device="jax")
    assert ops.shifted.out(x, 1.0, out=out) is out and out.tolist() == [2, 4]
    assert ops.shifted(torch.ones(2, dtype=torch.int64, device="jax")).dtype == torch.int64, (
        "the result has torch's dtype"
    )
    (status,) = [p for p in plugins.status() if p.name == "shifts"]
    assert status.state == "loaded" and status.ops == 1 and status.info["summary"] == "for a test"


def test_the_highest_priority_whose_conditions_hold_is_taken(ops, load):
    load("base", shift(0))
    load("floats", shift(10, priority=5, dtypes=(torch.float32,)))
    load("vectors", shift(20, priority=7, when=lambda x, by=1.0: len(x.shape) == 1 and x.shape[0] > 3))
    load("tpus", shift(30, priority=9, platforms=("tpu",)))
    assert ops.shifted(ones())[0] == 12
    assert ops.shifted(ones().double())[0] == 2
    assert ops.shifted(torch.ones(4, device="jax"))[0] == 22
    verdicts = torchax._registry.REGISTRY.explain(MISSING_OP, "cpu", torch.float32)
    assert [v.lowering.provider for v in verdicts] == ["tpus", "vectors", "floats", "base"]
    assert "platform" in verdicts[0].reason and any(v.taken for v in verdicts)


def test_a_tie_names_both_plugins(ops, load):
    load("first", shift(1))
    load("second", shift(2))
    with pytest.raises(errors.PluginError, match=r"'first'.*'second'.*same priority 0.*disable") as caught:
        ops.shifted(ones())
    assert MISSING_OP in str(caught.value)
    plugins.disable("second")
    assert ops.shifted(ones())[0] == 3


def test_plugins_are_switched_off_and_on(ops, load):
    load("switch", shift())
    x = ones()
    assert ops.shifted(x)[0] == 2
    plugins.disable("switch")
    with pytest.raises(errors.OperatorNotFound, match=r"not searched: .*switch \(disabled: torchax.plugins.disable\)"):
        ops.shifted(x)
    plugins.disable("switch")
    plugins.enable("switch")
    plugins.enable("switch")
    assert ops.shifted(x)[0] == 2
    for call in (plugins.disable, plugins.enable):
        with pytest.raises(errors.PluginError, match="no plugin named 'nobody'; found: .*aten"):
            call("nobody")


def test_an_override_of_an_existing_op_and_back(load):
    load("ours", Lowering(op="aten::sinc", fn=lambda x: x * 100, priority=1))
    assert torch.sinc(ones())[0] == 100
    plugins.disable("ours")
    torch.testing.assert_close(torch.sinc(ones()).cpu(), torch.sinc(torch.ones(2)))


def test_whole_ops_of_a_late_plugin_have_gradients(load):
    load("whole", Lowering(op="aten::hardswish", fn=lambda x: x * 3.0, priority=3))
    x = ones().requires_grad_()
    y = torch.nn.functional.hardswish(x)
    assert y.tolist() == [3, 3]


def test_a_custom_op_of_torch_library_is_lowered_and_differentiable(load):
    @torch.library.custom_op("torchax_plugins::cube", mutates_args=())
    def cube(x: torch.Tensor) -> torch.Tensor:
        return x**3

    cube.register_fake(lambda x: torch.empty_like(x))
    cube.register_autograd(
        lambda ctx, g: g * 3 * ctx.saved_tensors[0] ** 2,
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )

    @lowering("torchax_plugins::cube")
    def lowered(x):
        return x * x * x

    load("cubes", *lowered.__torchax__)
    x = torch.tensor([2.0, 3.0], device="jax", requires_grad=True)
    y = cube(x)
    y.sum().backward()
    assert y.tolist() == [8, 27] and x.grad.tolist() == [12, 27] and cube(torch.ones(1)).item() == 1


def test_jax_differentiates_a_lowering_by_its_grad(ops, load):
    def fn(x, by=1.0):  # a while loop has no reverse derivative in JAX
        return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] * x + by), (0, x))[1]

    def grad(cotangent, args, result, needs):
        x, by = args
        assert needs == (True,) and result.shape == x.shape
        return (cotangent * (4 * x**3 + by * (2 * x + 1)),)

    load("loops", Lowering(op=MISSING_OP, fn=fn, grad=grad))
    f = torchax.interop.jax_view(lambda x: ops.shifted(x, 2.0).sum())
    x = jnp.asarray([2.0, 3.0])
    assert float(f(x)) == 4 * 4 + 2 * (4 + 2 + 1) + 81 + 2 * (9 + 3 + 1)
    assert jax.jit(jax.grad(f))(x).tolist() == [32 + 2 * 5, 108 + 2 * 7]


def test_plugins_cost_nothing_per_call(ops, load, monkeypatch):
    for i in range(10):
        serving = dict(priority=i, when=lambda x, by=1.0, n=i: x.shape[0] == n, platforms=("cpu",))
        load(f"crowd{i}", shift(i, **serving), *(Lowering(op=f"torchax_plugins::op{k}", fn=abs) for k in range(100)))
    x = torch.ones(9, device="jax")
    assert ops.shifted(x).tolist() == [11] * 9
    monkeypatch.setattr(torchax._registry.Registry, "resolve", lambda *_: pytest.fail("resolved again"))
    assert ops.shifted(x).tolist() == [11] * 9


def test_plugins_cost_little_at_the_start(load):
    module = types.ModuleType("crowded")
    registry = torchax._registry.REGISTRY
    module.TABLE = [Lowering(op=op, fn=lambda *args, **kwargs: args[0], priority=-9) for op in registry.ops()[:500]]
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        load("crowded", hooks={"torchax_register_ops": lambda self, registry: registry.collect(module)})
    finally:
        sys.setprofile(None)
    assert [p.ops for p in plugins.status() if p.name == "crowded"] == [500]
    assert calls < 60 * 500, f"{calls / 500} Python and C calls for each lowering"


def test_a_predicate_that_raises_names_its_plugin(ops, load):
    load("clumsy", shift(when=lambda x, by=1.0: x.no_such_attribute))
    with pytest.raises(
        errors.PluginError, match=r"shifted: the predicate .*<lambda> of plugin 'clumsy' raised AttributeError"
    ):
        ops.shifted(ones())


def _view(read, inverse=None):
    view = view_lowering("aten::select.int")(read)
    view.inverse(inverse or (lambda base, value, dim, index: base))
    return view.__torchax__[0]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (Lowering(op=MISSING_OP, fn=lambda x: x), "takes 1 positional arguments, and up to 2 come"),
        (Lowering(op=MISSING_OP, fn=lambda x, by: x), "needs by, which does not always come: give it a default"),
        (Lowering(op=MISSING_OP, fn=jax.jit(lambda x, by: x)), "needs by"),
        (Lowering(op=MISSING_OP, fn=lambda x, by=1.0, *, key: x), "needs the keyword key"),
        (Lowering(op=MISSING_OP, fn=lambda x, by=1.0: x, kind="stateful", random=True), "has no keyword key"),
        (Lowering(op=MISSING_OP, fn=lambda x, by=1.0: x, layouts=True), "has no keyword row_major"),
        (Lowering(op="aten::gelu", fn=lambda x: x, whole=True), "has no keyword approximate"),
        (Lowering(op="aten::gelu", fn=lambda x, *, approx="none": x), "has no keyword approximate"),
        (Lowering(op="aten::sinc", fn=lambda x: x, when=lambda: True), "the predicate .* takes 0 positional arguments"),
        (Lowering(op=MISSING_OP, fn=None), "there is no function"),
        (Lowering(op=MISSING_OP, fn=lambda x, by=1.0: x, when="tpu"), "when='tpu' cannot be called"),
        (Lowering(op=MISSING_OP, fn=lambda x, by=1.0: x, kind="funcional"), "kind='funcional': one of functional, "),
        (Lowering(op=MISSING_OP, fn=lambda x, by=1.0: x, platforms="tpu"), r"write a tuple, \('tpu',\)"),
        (Lowering(op=MISSING_OP, fn=lambda x, by=1.0: x, platforms=("cuda",)), "JAX calls it 'gpu'"),
        (
            Lowering(op=MISSING_OP, fn=lambda x, by=1.0: x, dtypes=("float32",)),
            "dtypes has 'float32': expected dtypes of",
        ),
        (_view(lambda x, dim: x), "takes 2 positional arguments, and up to 3 come"),
        (_view(lambda x, dim, index: x, lambda base: base), "the inverse .* takes 1 positional arguments, and up to 4"),
    ],
)
def test_a_plugin_whose_lowering_cannot_be_what_it_says_is_quarantined(ops, load, entry, words):
    with pytest.raises(errors.PluginError, match=words) as caught:
        load("narrow", entry, Lowering(op="torchax_plugins::shifted_", fn=lambda: None))
    said = str(caught.value)
    assert "'narrow'" in said and f"{entry.op}: " in said and "(and 1 more)" in said
    if f"{entry.op}: the " in said:
        assert f"{__file__}:" in said and "Tensor" in said, "the place, and the schema"
    assert MISSING_OP not in torchax._registry.REGISTRY
    (status,) = [p for p in plugins.status() if p.name == "narrow"]
    assert status.state == "quarantined"


@pytest.mark.parametrize(
    "entry",
    [
        Lowering(op=MISSING_OP, fn=lambda *args: args[0] + 1),
        Lowering(op=MISSING_OP, fn=lambda x, by=1.0, extra=2.0, *, more=3.0: x + by),
        Lowering(op=MISSING_OP, fn=functools.partial(lambda shift, x, by=1.0: x + by, 0)),
        Lowering(op=MISSING_OP, fn=functools.wraps(abs)(lambda *args, **kwargs: args[0] + 1)),
        Lowering(op=MISSING_OP, fn=jax.jit(lambda x, by=1.0: x + by)),
        Lowering(op=MISSING_OP, fn=lambda x, by=1.0: x + by, when=lambda *_: True),
    ],
)
def test_what_takes_the_arguments_is_no_fault(ops, load, entry):
    load("wide", entry)
    assert ops.shifted(ones()).tolist() == [2, 2] and not plugins.faults("wide", thorough=True)


def test_partial_functions_are_looked_at_when_they_are_asked_for(ops, load):
    load(
        "partial",
        Lowering(op=MISSING_OP, fn=functools.partial(lambda shift, x: x, 0)),
        Lowering(op="aten::sinc", fn=abs),
    )
    assert not plugins.faults("partial")
    (found,) = plugins.faults("partial", thorough=True)
    assert (
        found.startswith(f"{MISSING_OP}: the lowering ") and f"{__file__}:" in found and "takes 1 positional" in found
    )


def test_a_lowering_of_an_op_that_is_defined_later_is_looked_at_when_it_is_called(load):
    load("early", Lowering(op="torchax_later::op", fn=lambda: None))
    lib = torch.library.Library("torchax_later", "DEF")
    lib.define("op(Tensor x) -> Tensor")
    try:
        with pytest.raises(
            errors.PluginError, match=r"'early' breaks the contract: torchax_later::op: .*takes 0 pos.*-early"
        ):
            torch.ops.torchax_later.op(ones())
    finally:
        lib._destroy()


def test_operators_that_torch_does_not_have_and_plugins_without_hooks_are_faults_for_doctor(load):
    load("misspelt", Lowering(op="aten::sincc", fn=abs))
    assert plugins.faults("misspelt") == []
    (found,) = plugins.faults("misspelt", thorough=True)
    assert found.startswith("aten::sincc: torch has no such operator; did you mean aten::sinc")
    plugins.register(object(), "idle")
    try:
        (found,) = plugins.faults("idle", thorough=True)
        assert "it has no hook" in found and "hookimpl" in found
    finally:
        plugins.disable("idle")
        plugins._found.pop("idle")
        plugins._objects.pop("idle")


def test_our_own_lowerings_have_the_parameters_of_their_operators():
    for name in ("aten", "pallas"):
        assert plugins.faults(name, thorough=True) == []


# Broken plugins ---------------------------------------------------------------------------------------------------


def test_a_name_is_taken_once(load):
    load("unique")
    with pytest.raises(errors.PluginError, match="'unique' is loaded already"):
        plugins.register(object(), "unique")


@pytest.mark.parametrize(
    "fault",
    ["raises", "exits", "wrong api", "twice", "no such hook", "wrong signature", "no dict", "no lowering", "no number"],
)
def test_a_broken_plugin_is_refused_and_leaves_nothing_behind(ops, load, fault):
    def register(self, registry):
        registry.add(shift())
        if fault == "raises":
            raise ZeroDivisionError("oops")
        if fault == "exits":
            raise SystemExit(3)
        if fault == "twice":
            registry.add(shift())

        if fault == "no lowering":
            registry.add("aten::sinc")
        if fault == "no number":
            registry.add(Lowering(op="aten::sinc", fn=abs, priority="9"))

    hooks = {"torchax_register_ops": register}
    if fault == "no such hook":
        hooks["torchax_registr_ops"] = lambda self: None
    if fault == "wrong signature":
        hooks["torchax_configure"] = lambda self, settings: None
    info = {"wrong api": {"name": "broken", "api": "9.0"}, "no dict": ["broken", "1.0"]}.get(fault)
    with pytest.raises(errors.PluginError, match="broken"):
        load("broken", hooks=hooks, info=info)
    assert MISSING_OP not in torchax._registry.REGISTRY
    (status,) = [p for p in plugins.status() if p.name == "broken"]
    expected = {
        "raises": "ZeroDivisionError: oops",
        "exits": "SystemExit",
        "wrong api": "core API 9.0",
        "twice": "twice",
        "no such hook": "torchax_registr_ops",
        "no dict": "torchax_plugin_info gives ['broken', '1.0']; expected a dict",
        "no lowering": "registry.add takes a torchax.ops.Lowering, got 'aten::sinc'",
        "no number": "aten::sinc: priority '9' is no number",
        "wrong signature": "{'settings'} are declared in the hookimpl but can not be found",
    }
    assert status.state == "quarantined" and expected[fault] in status.reason and isinstance(status.info, dict)
    with pytest.raises(errors.OperatorNotFound, match="quarantined"):
        ops.shifted(ones())


def test_plugins_declare_options(load):
    load(
        "options",
        hooks={"torchax_configure": lambda self, config: config.declare("test_plugin_mode", "a", choices=("a", "b"))},
    )
    try:
        torchax.config.test_plugin_mode = "b"
        with pytest.raises(ValueError, match="'a', 'b'"):
            torchax.config.test_plugin_mode = "c"
    finally:
        torchax.config._options.pop("test_plugin_mode", None)


# Installed plugins, in processes of their own ---------------------------------------------------------------------


def installed(folder, name, body):
    """An installed distribution with one entry point, as importlib.metadata sees it."""
    (folder / f"{name}_plugin.py").write_text(textwrap.dedent(body))
    info = folder / f"{name}_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[torchax.plugins]\n{name} = {name}_plugin\n")


def test_broken_installed_plugins_are_quarantined_with_one_warning_each(tmp_path):
    good = "import jax.numpy as jnp\nfrom torchax.plugins import hookimpl\n"
    installed(tmp_path, "raising", "raise RuntimeError('on import')")
    installed(tmp_path, "exiting", "import sys; sys.exit(3)")
    installed(
        tmp_path, "future", good + "@hookimpl\ndef torchax_plugin_info(): return {'name': 'future', 'api': '2.0'}\n"
    )
    installed(tmp_path, "syntax", "def f(:\n")
    installed(
        tmp_path,
        "fine",
        good + "@hookimpl\ndef torchax_plugin_info(): return {'name': 'fine', 'version': '1', 'api': '1.0'}\n",
    )
    installed(tmp_path, "unwanted", "raise RuntimeError('must not be imported')")
    out = run_python(
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    import torch, torchax\n"
        "for w in seen:\n"
        "    if 'torchax plugin' in str(w.message): print('WARNING', str(w.message).splitlines()[0])\n"
        "for p in torchax.plugins.status(): print(p.name, p.state, p.reason, sep='|')\n"
        "for name in ('raising', 'exiting'):\n"
        "    try: torchax.plugins.enable(name)\n"
        "    except torchax.errors.PluginError as e: print('REFUSED', e)\n"
        "print((torch.ones(2, device='jax') + 1).tolist())\n",
        PYTHONPATH=os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", ""))),
        TORCHAX_PLUGINS="-unwanted",
    )
    warned = [line for line in out.splitlines() if line.startswith("WARNING")]
    assert len(warned) == 4 and all(
        sum(f"'{n}'" in line for line in warned) == 1 for n in ("raising", "exiting", "future", "syntax")
    )
    assert "TORCHAX_PLUGINS=-raising" in out
    state = {line.split("|")[0]: line.split("|")[1:] for line in out.splitlines() if "|" in line}
    assert state["fine"][0] == "loaded" and state["aten"][0] == "loaded"
    assert state["raising"] == ["quarantined", "its import failed: RuntimeError: on import"]
    assert "SystemExit" in state["exiting"][1] and "core API 2.0" in state["future"][1]
    assert "REFUSED plugin 'raising' cannot be loaded: its import failed: RuntimeError: on import" in out
    assert "REFUSED plugin 'exiting' cannot be loaded: its import failed: SystemExit: 3" in out
    assert state["unwanted"] == ["disabled", "TORCHAX_PLUGINS"]
    assert out.splitlines()[-1] == "[2.0, 2.0]"


def test_of_two_installed_plugins_of_one_name_the_second_is_quarantined(tmp_path):
    for part in ("one", "two"):
        (tmp_path / part).mkdir()
        installed(tmp_path / part, part, "")
        entry = tmp_path / part / f"{part}_plugin-1.0.dist-info" / "entry_points.txt"
        entry.write_text(f"[torchax.plugins]\nshared = {part}_plugin\n")
    out = run_python(
        "import warnings\n"
        "warnings.simplefilter('ignore')\n"
        "import torchax\n"
        "for p in torchax.plugins.status(): print(p.name, p.state, p.reason, sep='|')\n",
        PYTHONPATH=f"{tmp_path / 'one'}:{tmp_path / 'two'}",
    )
    lines = [line for line in out.splitlines() if line.startswith("shared")]
    assert lines[0] == "shared|loaded|" and len(lines) == 2
    assert "|quarantined|" in lines[1] and "-plugin 1.0 has a plugin of this name" in lines[1]


def test_without_the_ops_of_pytorch():
    out = run_python(
        "import torch, torchax\n"
        "x = torch.empty(2, device='jax')\n"
        "print(x.device, x.detach().cpu().tolist())\n"
        "try: x + 1\n"
        "except torchax.errors.OperatorNotFound as e: print(e)\n",
        TORCHAX_PLUGINS="-aten,-pallas",
    )
    assert out.splitlines()[0] == "jax:0 [0.0, 0.0]"
    for part in (
        "aten::add.Tensor",
        "pip install torchax-ops-aten",
        "aten (disabled: TORCHAX_PLUGINS)",
        "fallback = 'cpu'",
    ):
        assert part in out


def test_no_warning_where_nothing_is_wrong():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(p.state in ("loaded", "disabled", "quarantined") for p in plugins.status())
        assert (jnp.ones(1) + 1)[0] == 2


def test_conditions_choose_among_views():
    library = torch.library.Library("chosen", "DEF")
    library.define("part(Tensor(a) x) -> Tensor(a)")
    torch.library.register_fake("chosen::part")(lambda x: x.narrow(0, 0, 1))

    def of(begin, **conditions):
        view = torchax.ops.view_lowering("chosen::part", **conditions)(lambda x: x[begin : begin + 1])
        view.inverse(lambda base, value: base.at[begin : begin + 1].set(value))
        return view

    views = [of(0), of(1, priority=1, dtypes=(torch.int32,)), of(2, priority=2, when=lambda x: len(x.shape) == 2)]
    from torchax.ops import REGISTRY

    with REGISTRY.providing("chosen"):
        for view in views:
            for entry in view.__torchax__:
                REGISTRY.add(entry)
    try:
        part = torch.ops.chosen.part
        assert part(torch.arange(3.0, device="jax")).tolist() == [0]
        assert part(torch.arange(3, dtype=torch.int32, device="jax")).tolist() == [1]
        x = torch.arange(3.0, device="jax")[:, None].clone()
        part(x).fill_(7)
        assert x.tolist() == [[0], [1], [7]]
    finally:
        REGISTRY.remove("chosen")
