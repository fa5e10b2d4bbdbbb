"""What Lumen uses of torch that torch does not promise to keep, and whether the installed torch has it.

This is the only module that reaches into private torch. Others write `_torch_compat.foreach_add(...)`: a private name
without its leading underscores, looked up on first use. A test reads the source of `lumen/` and fails for a private
name that is used elsewhere, and for one that is listed here and not used. Prefer a public way where torch has one.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DataLoader

if TYPE_CHECKING:  # classes that are inherited from or named in annotations; `__getattr__` finds them
    from torch._subclasses.fake_tensor import DataDependentOutputException as DataDependentOutputException
    from torch._subclasses.fake_tensor import DynamicOutputShapeException as DynamicOutputShapeException
    from torch._subclasses.fake_tensor import FakeTensorConverter as FakeTensorConverter
    from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
    from torch.nn.modules.batchnorm import _BatchNorm
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
    from torch.utils.backend_registration import _DummyPrivateUse1Hook

    BatchNorm = _BatchNorm
    DummyPrivateUse1Hook = _DummyPrivateUse1Hook

TRIED = ("2.11", "2.12", "2.13", "2.14")  # the minor versions of torch in which all of `PRIVATE` was looked up


class Use(NamedTuple):
    """What private names of torch are used for, and the minor versions of torch that have them.

    Lumen has a fallback for each of `TRIED` that is not among them.
    """

    names: str  # with spaces between them; `alias=name`, or `function(keyword=)` for an argument of a function
    purpose: str
    torch: tuple[str, ...] = TRIED


_USES = (  # what this module offers by name, through `__getattr__`
    # Optimizers
    Use(
        "torch._foreach_add torch._foreach_add_ torch._foreach_addcdiv_ torch._foreach_addcmul torch._foreach_addcmul_"
        " torch._foreach_copy_ torch._foreach_lerp torch._foreach_lerp_ torch._foreach_mul torch._foreach_mul_"
        " torch._foreach_norm torch._foreach_sign_ torch._foreach_sqrt torch._foreach_sqrt_",
        "one call for many tensors: updates, sums of gradients, norms",
    ),
    Use(
        "torch._fused_adagrad_ torch._fused_adam_ torch._fused_adamw_ torch._fused_sgd_",
        "a whole update in one kernel",
    ),
    Use(
        "aten_fused_adagrad_=torch.ops.aten._fused_adagrad_ aten_fused_adam_=torch.ops.aten._fused_adam_"
        " aten_fused_adamw_=torch.ops.aten._fused_adamw_ aten_fused_sgd_=torch.ops.aten._fused_sgd_",
        "to see them in a plan, where tensors have no values",
    ),
    # Which transform of torch.func, which mode, which tracer a call runs under
    Use(
        "torch._C._functorch.peek_interpreter_stack"
        " torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack"
        " torch._C._functorch.is_functorch_wrapped_tensor"
        " torch._C._functorch.TransformType",
        "whether a call runs inside of a transform of torch.func, which kernels, hooks and reads of values must not",
    ),
    Use("torch._C._len_torch_function_stack", "whether a mode, such as a default device, changes what torch calls do"),
    Use(
        "torch._C._dispatch_tls_local_include_set torch._C.DispatchKey torch._C.DispatchKeySet",
        "whether a mode for random numbers stands between a call and its kernel",
    ),
    Use(
        "torch._C._functorch.is_gradtrackingtensor torch._C._functorch.get_unwrapped"
        " torch._C._functorch.is_batchedtensor",
        "whether a buffer differs between the rows of a vmap",
    ),
    Use("torch._C._ExcludeDispatchKeyGuard", "autocast on the device that a plan is made on"),
    Use("torch._C._SetExcludeDispatchKeyGuard", "a kept result that notices writes to the tensor that it is"),
    Use("torch._ops.OperatorBase torch._ops.OpOverloadPacket", "whether a value names an operation"),
    Use(
        "functorch_config=torch._functorch.config",
        "a compiled block whose backward pass runs outside of the autocast of its forward",
    ),
    # Autograd
    Use("torch.autograd.graph._engine_run_backward", "a backward pass that adds gradients to existing sums"),
    Use(
        "torch.Tensor._make_subclass torch._C.DisableTorchFunctionSubclass",
        "a tensor that stands for a param which is gathered on first use",
    ),
    Use("tensor_version=torch.Tensor._version", "whether a tensor was written to in place"),
    # Tracing and compiling
    Use(
        "inductor_compile=torch._inductor.compile torch._inductor.list_mode_options"
        " torch._dynamo.backends.debugging.aot_eager",
        "what lm.compile hands a recorded step to",
    ),
    Use(
        "torch._subclasses.fake_tensor.FakeTensor torch._subclasses.fake_tensor.FakeTensorMode"
        " torch._subclasses.fake_tensor.FakeTensorConverter torch._subclasses.fake_tensor.unset_fake_temporarily"
        " torch.fx.experimental.proxy_tensor.disable_proxy_modes_tracing"
        " torch._subclasses.fake_tensor.DataDependentOutputException"
        " torch._subclasses.fake_tensor.DynamicOutputShapeException"
        " torch._subclasses.fake_tensor.UnsupportedFakeTensorException",
        "tensors without values: plans, counts of operations, and why a step cannot be recorded",
    ),
    Use("torch.utils._python_dispatch.TorchDispatchMode", "to see every operation of a plan"),
    Use(
        "torch.utils._python_dispatch._disable_current_modes",
        "to try a kernel unseen by those who count operations or memory",
    ),
    Use(
        "torch_pytree=torch.utils._pytree",
        "the trees that torch.func and torch.export know; Lumen's own dataclasses among them",
    ),
    Use("aten_local_scalar_dense=torch.ops.aten._local_scalar_dense", "to see where a step reads a tensor's value"),
    Use(
        "torch.ops.aten._scaled_dot_product_flash_attention torch.ops.aten._scaled_dot_product_efficient_attention"
        " torch.ops.aten._scaled_dot_product_cudnn_attention torch.ops.aten._scaled_dot_product_flash_attention_for_cpu"
        " torch.ops.aten._scaled_dot_product_flash_attention_backward"
        " torch.ops.aten._scaled_dot_product_efficient_attention_backward"
        " torch.ops.aten._scaled_dot_product_cudnn_attention_backward"
        " torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward"
        " torch.ops.aten._cudnn_rnn torch.ops.aten._cudnn_rnn_backward torch.ops.aten._grouped_mm",
        "operations that torch's own counter of products leaves out, or refuses for some shapes (2.11)",
    ),
    Use(
        "torch.utils.backend_registration._DummyPrivateUse1Hook"
        " torch.utils.backend_registration._setup_privateuseone_for_python_backend"
        " torch._C._get_privateuse1_backend_name",
        "the device that a plan with offloading is made on",
    ),
    # Modules and data
    Use(
        "torch.nn.modules.batchnorm._BatchNorm torch.nn.modules.batchnorm._NormBase"
        " ParametrizedSpectralNorm=torch.nn.utils.parametrizations._SpectralNorm"
        " torch.nn.modules.instancenorm._InstanceNorm torch.nn.modules.dropout._DropoutNd",
        "all layers of a kind, whatever their dims",
    ),
    # Several processes
    Use(
        "torch._C._nn.flatten_dense_tensors torch._C._nn.unflatten_dense_tensors",
        "many tensors in one buffer, and back",
    ),
    Use("c10d_functional=torch.ops._c10d_functional", "collectives that a compiled step can hold"),
    Use("torch.distributed.distributed_c10d._get_default_store", "keys that the processes share, to meet and to fail"),
    Use(
        "torch._C._distributed_c10d._resolve_process_group torch.testing._internal.distributed.fake_pg.FakeStore",
        "the world of a plan, which is only thought of",
    ),
    Use("torch._C._distributed_c10d._dump_fr_trace_json", "the last collectives of a process, over Gloo"),
    Use("torch.cuda.memory._record_memory_history torch.cuda.memory._dump_snapshot", "snapshots of CUDA's memory"),
    Use("torch._appdirs.user_cache_dir", "the directory in which DeepSpeed builds its kernels"),
)

_ATTRIBUTES = (  # what its functions reach into
    Use("torch._C._get_dispatch_mode torch._C._TorchDispatchModeKey", "whether make_fx records what a call does"),
    Use("torch._foreach_clone", "one call for many tensors: copies of a state", TRIED[1:]),
    Use("torch.distributed._functional_collectives", "the shapes of collectives that a compiled step can hold"),
    Use("torch.UntypedStorage._cdata", "which tensors share memory, also where they have no values"),
    Use(
        "torch._ops.OpOverload._opname torch._ops.OpOverload._overloadname torch._ops.OpOverload._schema",
        "which operation a plan sees, and which arguments an operation of a recorded step writes to",
    ),
    Use(
        "torch.nn.Module._parameters torch.nn.Module._buffers torch.nn.Module._modules",
        "where tensors are put while a module runs as a function",
    ),
    Use(
        "torch.nn.Module._forward_hooks torch.nn.Module._forward_pre_hooks torch.nn.Module._backward_hooks",
        "whether a block has hooks, which a compiled copy of it would leave out",
    ),
    Use(
        "torch.utils.checkpoint._checkpoint_without_reentrant_generator",
        "to put a model's tensors back when a checkpoint inside of it recomputes",
    ),
    Use("torch.compiler._is_compiling_flag", "what a library learns that asks whether its code is compiled"),
    Use("torch._C._distributed_c10d._dump_nccl_trace_json", "the same over NCCL, in builds with it", ()),
    Use("torch.nn.MultiheadAttention._reset_parameters", "to initialize a module that was made on the meta device"),
    Use(
        "torch.utils.data.DataLoader._iterator"
        " torch.utils.data.dataloader._MultiProcessingDataLoaderIter._shutdown_workers"
        " torch.utils.data.dataloader._MultiProcessingDataLoaderIter._workers",
        "to end a loader's processes at once, and to say which of them died",
    ),
    Use("torch.distributed.device_mesh.DeviceMesh._pg_registry", "to let go of a mesh's groups when a world is left"),
    Use("torch.distributed.device_mesh.DeviceMesh._flatten", "the processes of several axes of a mesh together"),
    Use(
        "torch.fx.experimental.proxy_tensor.make_fx(_allow_non_fake_inputs=)",
        "a recorded step that closes over real tensors",
    ),
    Use(
        "torch.utils._pytree.tree_flatten torch.utils._pytree.tree_leaves torch.utils._pytree.tree_map"
        " torch.utils._pytree.tree_unflatten torch.utils._pytree.register_pytree_node torch.utils._pytree.GetAttrKey",
        "what Lumen takes from torch's trees",
    ),
)

_LISTED = [entry.rpartition("=")[::2] for use in _USES for entry in use.names.split()]
NAMES = {alias or name.rpartition(".")[2].lstrip("_"): name for alias, name in _LISTED}
"""The full names of what this module offers, by the names under which it does."""
PRIVATE = {re.sub(r"^\w+=", "", name): use for use in (*_USES, *_ATTRIBUTES) for name in use.names.split()}
"""Every private name of torch that Lumen uses, with what it is used for."""


def __getattr__(name: str) -> Any:
    """An object of `NAMES`, looked up on first use: a torch that lacks one name fails only where it is used."""
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    full = NAMES[name]
    if not has(full):
        raise AttributeError(
            f"torch {torch.__version__} has no {full}, which Lumen uses for {PRIVATE[full].purpose}."
            f" Install one of torch {', '.join(PRIVATE[full].torch)}"
        )
    value = globals()[name] = _resolve(full)
    return value


_KEYWORD = re.compile(r"(.*)\((\w+)=\)")


def missing() -> list[str]:
    """What of `PRIVATE` the installed torch lacks, a line for each: the name, its purpose and who is known to have it.

    A name that this version is known to lack is left out: Lumen has a fallback for it.

    >>> missing()
    []
    """
    installed = ".".join(torch.__version__.split(".")[:2])
    return [
        f"{name} ({use.purpose}; found in torch {', '.join(use.torch)})"
        for name, use in PRIVATE.items()
        if not has(name) and (installed in use.torch or installed not in TRIED)
    ]


def _clone_one_by_one(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


make_fx_mode: Callable[[], Any] = functools.partial(torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey.PROXY)
"""The mode in which `make_fx` records the operations of the caller; None outside of it. An eager step asks twice."""


def in_make_fx() -> bool:
    """Whether `make_fx` records the operations of the caller, as it does under `lm.compile`."""
    return make_fx_mode() is not None


def in_graph_capture() -> bool:
    """Whether `torch.compile` or `make_fx` records the operations of the caller.

    >>> in_graph_capture()
    False
    """
    return torch.compiler.is_compiling() or make_fx_mode() is not None


clone_all: Callable[[list[Tensor]], Sequence[Tensor]] = getattr(torch, "_foreach_clone", _clone_one_by_one)
"""A copy of each tensor of a list, by one call where torch has one (not 2.11)."""

dump_nccl_trace: Callable[[], str] | None = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None)
"""The last collectives over NCCL, as JSON; None in a build without it."""


def has(name: str) -> bool:
    """Whether the installed torch has this name, private or not.

    >>> has("torch.nn.Module._parameters"), has("torch._foreach_no_such_thing")
    (True, False)
    >>> has("torch.nn.functional.dropout(p=)"), has("torch.nn.functional.dropout(no_such=)")
    (True, False)
    """
    keyword = _KEYWORD.fullmatch(name)
    try:
        if keyword is not None:
            return keyword[2] in inspect.signature(_resolve(keyword[1])).parameters
        _resolve(name)
    except (AttributeError, ImportError):
        return False
    return True


def _resolve(name: str) -> Any:
    """The object of that name; raises AttributeError or ImportError where there is none."""
    above, _, last = name.rpartition(".")
    if not above:
        return importlib.import_module(last)
    holder = _resolve(above)
    if inspect.ismodule(holder) and not hasattr(holder, last):
        importlib.import_module(name)
    if inspect.isclass(holder) and not hasattr(holder, last) and _sets(holder, last):
        return None
    return getattr(holder, last)


def _sets(cls: type, attribute: str) -> bool:
    """Whether objects of this class have the attribute from when they are made."""
    begin = inspect.unwrap(getattr(cls, "__init__", object.__init__))  # DeepSpeed wraps that of nn.Module
    code = getattr(begin, "__code__", None)
    if code is not None and attribute in (*code.co_names, *code.co_consts):
        return True
    return cls is torch.nn.Module and hasattr(cls(), attribute)  # whose __init__ others replace


# ---------------------------------------------------------------------------------------- attributes of objects

RESET_PARAMETERS = "_reset_parameters"
CHECKPOINT_GENERATOR = "_checkpoint_without_reentrant_generator"
IS_COMPILING = "_is_compiling_flag"
MODULE_TABLES = PARAMETERS, BUFFERS, MODULES = "_parameters", "_buffers", "_modules"
own_params, own_buffers, own_modules = map(attrgetter, MODULE_TABLES)
"""The tables in which a module keeps the params, buffers and modules that are its own and not its children's."""

forward_pre_hooks = attrgetter("_forward_pre_hooks")
version_of = attrgetter("_version")
"""How often a tensor was written to in place, through itself or a view."""

storage_id = attrgetter("_cdata")
"""The address of a storage object, which tensors that share memory have in common."""

SCHEMA = "_schema"
schema_of, operation_name, overload_name = map(attrgetter, (SCHEMA, "_opname", "_overloadname"))


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that was given to `torch.compile`, or `module` itself."""
    return getattr(module, "_orig_mod", module)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling this module also runs hooks of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def record(function: Callable[..., Any], example: Sequence[Any]) -> torch.fx.GraphModule:
    """The operations of `function` on tensors like those of `example`; it may close over real tensors."""
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*example)


def is_undispatched() -> bool:
    """Whether no mode, such as vmap or a tracer, stands between the calls of this thread and their kernels."""
    this: Any = sys.modules[__name__]
    keys = this.dispatch_tls_local_include_set()
    return bool(keys.remove(this.DispatchKey.BackendSelect).remove(this.DispatchKey.ADInplaceOrView).raw_repr() == 0)


def worker_iterator(loader: DataLoader[Any]) -> Any:
    """The iterator that a loader keeps for its next epoch, or None."""
    return loader._iterator


def drop_worker_iterator(loader: DataLoader[Any]) -> None:
    """Have the next epoch of a loader begin with another iterator."""
    loader._iterator = None


def shut_down_workers(loader: DataLoader[Any]) -> None:
    """End the processes of a loader's iterator at once."""
    loader._iterator._shutdown_workers()  # type: ignore[union-attr]


def worker_processes(loader: DataLoader[Any]) -> list[BaseProcess]:
    """The processes of a loader's iterator."""
    return [] if loader._iterator is None else loader._iterator._workers  # type: ignore[attr-defined]


def flattened(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """The axes of a mesh as one axis, called `name`."""
    return mesh._flatten(name)


def graph_collectives() -> Any:
    """The collectives that a graph can hold; their shapes are known once torch's module of them has been imported."""
    importlib.import_module("torch.distributed._functional_collectives")
    return torch.ops._c10d_functional


# ---------------------------------------------------------------------------------------- process groups


def release_groups(mesh: DeviceMesh) -> None:
    """Have a mesh hold its process groups no longer; its sizes and names stay.

    torch 2.11 to 2.13: `_pg_registry` of a root mesh holds the groups of all its submeshes, for
    `torch.compile` to look them up. Elsewhere a mesh keeps their names.
    """
    getattr(mesh, "_pg_registry", {}).clear()
