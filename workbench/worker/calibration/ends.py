"""What follows a model's last layer: the final norm and the output matrix, and gradients of what the model says there.

At every position a token y is drawn from the model's own distribution and -log p(y) differentiated: the mean of that
gradient's outer product is the Hessian of the divergence from the model (its Fisher matrix), whatever the text says.
What else happens to logits (caps, factors) is transformers' own `forward`, run with nothing before them. In memory are
the logits of a chunk of tokens and a slab of the output matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from workbench.errors import UserError
from workbench.worker.calibration.weights import Weights, read_tensor

LOGITS = 2**23
"""Logits at once: 32 MiB in float32, of which autograd makes half a dozen."""
SLAB = 2**22
"""Weights of the output matrix at once: 16 MiB in float32."""


class Head:
    """The final norm and the output matrix of a base."""

    def __init__(self, weights: Weights, device: Any) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(weights.folder))
        if "model.norm.weight" not in weights.tensors or not hasattr(whole.model, "norm"):
            raise UserError(
                f"model_type '{weights.config['model_type']}' does not end in `model.norm`, where gradients "
                "begin: name a `type` (GGUF), leave `objective` out (AWQ, GPTQ)"
            )
        self.weights, self.device = weights, device
        self.name = "model.embed_tokens.weight" if weights.tied else "lm_head.weight"
        self.rows, self.columns = weights.tensors[self.name].shape
        self.norm = whole.model.norm
        parts = {name: read_tensor(weights, f"model.norm.{name}") for name in self.norm.state_dict()}
        self.norm.load_state_dict({name: part.to(device, torch.float32) for name, part in parts.items()}, assign=True)
        self.norm.requires_grad_(False)
        whole.model, whole.lm_head = _passed(), torch.nn.Identity()
        self._after = whole
        bias = "lm_head.bias"
        self.bias = read_tensor(weights, bias).to(device).float() if bias in weights.tensors else None

    def slabs(self) -> Iterator[tuple[int, Any]]:
        """The output matrix in pieces: first row, float32 [rows, hidden]."""
        import torch
        from safetensors import safe_open

        step = max(1, SLAB // self.columns)
        with safe_open(self.weights.tensors[self.name].file, framework="pt") as file:
            stored = file.get_slice(self.name)
            for first in range(0, self.rows, step):
                yield first, stored[first : first + step].to(device=self.device, dtype=torch.float32)

    @property
    def chunk(self) -> int:
        """Tokens whose logits are in memory at once."""
        return max(1, LOGITS // self.rows)

    def products(self, normed: Any) -> Any:
        """[tokens, hidden] after the final norm -> [tokens, vocabulary], before caps and factors."""
        import torch

        found = torch.empty(len(normed), self.rows, device=self.device)
        for first, slab in self.slabs():
            found[:, first : first + len(slab)] = normed @ slab.t()
        return found if self.bias is None else found + self.bias

    def distribution(self, products: Any) -> tuple[Any, Any]:
        """The probabilities of all tokens, and how fast logits change with products, [tokens, vocabulary] each."""
        import torch

        with torch.enable_grad():
            products = products.detach().requires_grad_()
            logits = self._logits(products)
            (slopes,) = torch.autograd.grad(logits.sum(), products)
        return logits.detach().softmax(-1), slopes

    def gradient(self, hidden: Any, chance: Any) -> Any:
        """The gradient of -log p(y) by `hidden` [tokens, hidden] of a chunk; `chance`: a generator of the processor's,
        which draws y."""
        import torch

        with torch.enable_grad():
            hidden = hidden.detach().requires_grad_()
            normed = self.norm(hidden)
            products = self.products(normed.detach()).requires_grad_()
            said = self._logits(products).log_softmax(-1)
            drawn = torch.multinomial(said.detach().exp().cpu(), 1, generator=chance).to(self.device)
            loss = -said.gather(1, drawn).sum()
            (by_products,) = torch.autograd.grad(loss, products)
            by_normed = torch.zeros_like(normed)
            for first, slab in self.slabs():
                by_normed += by_products[:, first : first + len(slab)] @ slab
            (found,) = torch.autograd.grad(normed, hidden, by_normed)
        return found

    def _logits(self, products: Any) -> Any:
        return self._after(inputs_embeds=products[None]).logits[0].float()


def _passed() -> Any:
    """Stands in the decoder's place: what is given as its input is its output."""
    import torch
    from transformers.modeling_outputs import MoeModelOutputWithPast

    class Passed(torch.nn.Module):
        def forward(self, inputs_embeds: Any, **rest: Any) -> Any:
            return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)

    return Passed()
