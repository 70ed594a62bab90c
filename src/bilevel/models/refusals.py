"""Checks that refuse modules with which a hypergradient would be wrong, before anything is computed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parallel import DistributedDataParallel

from bilevel.models import fsdp
from bilevel.models.recomputed import Recomputed


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside an `nn.DataParallel`, which computes the same on one device, or the module itself."""
    while isinstance(module, nn.DataParallel):
        module = module.module
    return module


def refuse_unfit(module: nn.Module, name: str, trained: bool) -> None:
    """Raise if the derivative of a layer of a module would be missing or wrong.

    Args:
        module: the module as the user passed it, in `params` or `meta`.
        name: the argument in which it was passed.
        trained: whether an inner loop trains it, so that its running statistics are part of the inner state.

    Raises:
        ValueError: a layer is refused. The message names the layer, the reason, and what to write instead.
    """
    for path, layer in module.named_modules():
        fault = _fault(layer)
        if fault is None and isinstance(layer, _NormBase) and layer.training and layer.running_mean is not None:
            fault = _fault_of_running_statistics(module, layer, trained)
        if fault is not None:
            where = f"layer {path!r} of {name}" if path else name
            raise ValueError(f"{where} is {_article(type(layer).__name__)} {fault}")
    for path, parameter in module.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"parameter {path!r} of {name} has no shape yet (a lazy layer); run one batch through the module "
                "first: model(batch)"
            )
        if parameter.is_meta and parameter.requires_grad:
            raise ValueError(
                f"parameter {path!r} of {name} is on the meta device, where tensors have no values; write "
                "model.to_empty(device='cpu') and load or initialise its parameters"
            )
        if parameter._post_accumulate_grad_hooks:  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError(post_accumulate_message(f"parameter {path!r} of {name}"))


def refuse_unfit_tensor(tensor: Tensor, name: str) -> None:
    """Raise if the derivative with respect to a tensor of a tree would be missing or wrong.

    Args:
        tensor: the tensor as the user passed it.
        name: the tensor's name in error messages.

    Raises:
        ValueError: the tensor is refused. The message has the reason and what to write instead.
    """
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device, where tensors have no values; make it on cpu or a GPU")
    if tensor._post_accumulate_grad_hooks:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError(post_accumulate_message(name))


def post_accumulate_message(name: str) -> str:
    """Return the message with which a parameter with a post-accumulate hook is refused."""
    return (
        f"{name} has a hook from register_post_accumulate_grad_hook, which acts on .grad, and inner steps have none; "
        "register_hook with a differentiable function is applied in every inner step"
    )


def _fault(layer: nn.Module) -> str | None:
    if isinstance(layer, torch.jit.ScriptModule):
        return "compiled by TorchScript, whose tensors cannot be exchanged; pass the module before torch.jit.script"
    if isinstance(layer, DistributedDataParallel):
        return (
            "whose hooks average gradients over processes in .grad, which inner steps do not have; pass model.module, "
            "and let fit share its work among processes (see bilevel.experimental.Workers)"
        )
    if isinstance(layer, nn.DataParallel):
        return "inside another module, which copies layers to other devices; use the layers without it"
    if isinstance(layer, LazyModuleMixin) and LazyModuleMixin.has_uninitialized_params(layer):  # pyright: ignore
        return "whose parameters have no shape yet; run one batch through the module first: model(batch)"
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        return _fault_of_embedding(layer)
    if isinstance(layer, nn.SyncBatchNorm) and layer.training:
        return (
            "whose batch statistics are exchanged between processes without second derivatives; build the model "
            "without convert_sync_batchnorm, or put that layer in eval mode"
        )
    if layer.training and _is_spectrally_normalized(layer):
        return (
            "whose spectral norm is iterated under torch.no_grad() at every call, so that the second derivatives "
            "of the weight miss a part; put that layer in eval mode, where its vectors are constants"
        )
    if layer._backward_hooks and not layer._is_full_backward_hook:
        return "with a hook from register_backward_hook, which PyTorch has replaced by register_full_backward_hook"
    if layer._backward_pre_hooks:
        return (
            "with a hook from register_full_backward_pre_hook, which may change gradients in a way that has no second "
            "derivative; remove it, or write a differentiable hook with parameter.register_hook"
        )
    return None


def _fault_of_embedding(layer: nn.Embedding | nn.EmbeddingBag) -> str | None:
    if layer.max_norm is not None:
        return (
            f"with max_norm={layer.max_norm}, which rescales the weight in place at every call, without a derivative; "
            "leave max_norm out and normalise the rows in the loss: functional.normalize(weight)[ids]"
        )
    if layer.scale_grad_by_freq and layer.weight.requires_grad:
        return (
            "with scale_grad_by_freq=True, for which PyTorch has no second derivative; leave it out, and weigh the "
            "loss by frequency"
        )
    if layer.sparse and layer.weight.requires_grad:
        return "with sparse=True, whose gradients are sparse tensors without second derivatives; write sparse=False"
    return None


def _fault_of_running_statistics(module: nn.Module, layer: _NormBase, trained: bool) -> str | None:
    advice = (
        "write torch.func.replace_all_batch_norm_modules_(model) to normalise with the batch alone, build it with "
        "track_running_stats=False, or put that layer in eval mode"
    )
    if not trained:
        return f"that updates running statistics, and a module in meta is no part of the inner state; {advice}"
    if fsdp.is_sharded(module):
        return f"that updates running statistics in a module to which fully_shard was applied; {advice}"
    if any(layer in inside.modules() for inside in module.modules() if isinstance(inside, Recomputed)):
        return f"inside a Recomputed layer, which would update running statistics at every computation; {advice}"
    return None


def _is_spectrally_normalized(layer: nn.Module) -> bool:
    if type(layer).__name__ == "_SpectralNorm":
        return True
    return any(type(hook).__name__ == "SpectralNorm" for hook in layer._forward_pre_hooks.values())


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIO' else 'a'} {name}"
