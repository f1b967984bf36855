"""`AneePreTrainedModel`: a frozen base, held by reference, with our modules beside it: build, load, save, attach.

What it computes is up to the models that inherit it, see `modeling_anee.py`.
"""

import contextlib
import contextvars
import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .adoption import adopt, adopt_generation_config, take_apart
from .base_dropped import DroppedWeight
from .base_loading import base_to_wrap, check_device_map, check_fingerprint, load_base
from .base_memory import held_bytes
from .base_model import running_device
from .bridges import Bridges
from .configuration_anee import AneeConfig
from .configuration_prices import hardware_of
from .controller import Controller
from .controller_kinds import build_controller
from .corrections import Corrections
from .dropping import what_to_drop
from .executor import Executor
from .fingerprint import fingerprint, same_base
from .generation_state import generation_of
from .loading_arguments import BASE_KWARGS, HUB_KWARGS, refuse_unknown_kwargs
from .narrow import Orders
from .other_dtype import check_dial
from .upgrade import upgrade
from .weight_files import readable_weights
from .wrapping import check_base


logger = logging.get_logger("transformers.anee")  # follows the verbosity of transformers

# While our own modules load, no base may be attached: transformers would overwrite its buffers.
_without_base: contextvars.ContextVar[bool] = contextvars.ContextVar("anee_without_base", default=False)


@contextlib.contextmanager
def without_base() -> Iterator[None]:
    """Models built inside have no base yet."""
    token = _without_base.set(True)
    try:
        yield
    finally:
        _without_base.reset(token)


class AneePreTrainedModel(PreTrainedModel):
    """A frozen base causal LM with our modules: a controller, and bridges for what it leaves out.

    Build it with `from_base`, load it with `from_pretrained`. Models with other heads keep the names of these weights.
    """

    config_class = AneeConfig
    base_model_prefix = "base"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = False
    config: AneeConfig
    base: Any  # the causal LM, whose attributes differ between families
    takes_encoders = False  # as bases
    _supports_sdpa = True

    def __init__(self, config: AneeConfig) -> None:
        config.check()
        super().__init__(config)
        self.bridges = Bridges(config)
        self.corrections = Corrections(config.corrections)
        self.orders = Orders(config.orders)
        self.controller: Controller = build_controller(config)
        if next(self.controller.parameters(), None) is None:  # asked to run a trained artifact by its plans, say
            self._keys_to_ignore_on_load_unexpected = {r"^controller\."}
        self.make_heads()
        self.post_init()
        if not _without_base.get():
            self.attach_base(AutoModelForCausalLM.from_config(config.text_config))

    def make_heads(self) -> None:
        """Build what a model has of its own beside what all have: nothing."""

    # Build, load and save

    @classmethod
    def from_base(
        cls,
        base: str | os.PathLike | PreTrainedModel,
        *,
        controller: str = "budget",
        energy_budget: float = 1.0,
        gguf_file: str | None = None,
        revision: str | None = None,
        dtype: str | torch.dtype | None = None,
        device_map: Any = None,
        drop_full: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Wrap a base that is not an artifact yet; the controllers are untrained.

        Args:
            base: Hub name or folder, or a loaded causal LM, which is wrapped as it is.
            controller: kind of controller, see `AneeConfig`.
            energy_budget: default budget in [0, 1].
            gguf_file: GGUF file of the base in its repository or folder.
            revision: revision of the base on the Hub.
            dtype: dtype of the base; default: that of its checkpoint.
            device_map: where the base's layers go.
            drop_full: let the base's own weights go as soon as the `precisions` are made from them: a loaded base that is given
                can't be run by itself afterwards, moved or cast. Budgets that need the full weights are refused then.
            kwargs: fields of `AneeConfig`, and further arguments of the base's `from_pretrained`.

        Raises:
            ValueError: a base of an unknown family (the known ones are listed), what is no causal LM (an artifact, a wrapper, a
                classifier, ...; the message says what to do), a keyword that nobody knows, a bad configuration field, or
                `drop_full` where every plan needs the full weights.
            OSError: the base can't be found.
        """
        fields = {name: kwargs.pop(name) for name in list(kwargs) if name in AneeConfig.__dataclass_fields__}
        fields |= {"controller": controller, "energy_budget": energy_budget}
        given = {"revision": revision, "gguf_file": gguf_file, "dtype": dtype, "device_map": device_map}
        kwargs |= {name: value for name, value in given.items() if value is not None}
        wrapped, names = base_to_wrap(base, kwargs)
        text_config = wrapped.config.to_dict()
        for name in ("quantization_config", "_name_or_path"):
            text_config.pop(name, None)
        with without_base():
            model = cls(AneeConfig(text_config=text_config, **(names | fields)))
        check_fingerprint(model.config, wrapped)
        model.attach_base(wrapped, drop_full)
        return model.eval()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args: Any,
        config: Any = None,
        output_loading_info: bool = False,
        drop_full: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load an artifact: our modules from its safetensors, the base by the name in its config.

        Arguments about weights (`dtype`, `device_map`, `quantization_config`, `attn_implementation`, `gguf_file`, ...) go
        to the base; our modules are small and stay in float32. Fields of `AneeConfig` override the artifact's:
        `base_model_name_or_path=` points to another copy of the base. `drop_full=True` lets the base's own weights go as soon
        as the `precisions` are made from them, see `from_base`.

        Raises:
            ValueError: a plain model instead of an artifact, weights that don't belong to this model, a newer format, a keyword
                that nobody knows, or another base with `strict_base=True`.
            OSError: the artifact or its base can't be found or read.
        """
        if pretrained_model_name_or_path is None:
            raise ValueError("pretrained_model_name_or_path=None is not allowed: it must be an artifact's folder or Hub name")
        base_kwargs = {name: kwargs.pop(name) for name in BASE_KWARGS if name in kwargs}
        hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
        files: dict[str, Any] = {name: kwargs[name] for name in ("revision", "subfolder") if name in kwargs}
        if not isinstance(config, PreTrainedConfig):  # also of another AneeConfig class: that of shipped code
            source = pretrained_model_name_or_path if config is None else config
            config, kwargs = cls.config_class.from_pretrained(source, return_unused_kwargs=True, **kwargs)
            kwargs |= hub_kwargs | files
        elif fields := {name: kwargs.pop(name) for name in list(kwargs) if name in AneeConfig.__dataclass_fields__}:
            config = copy.deepcopy(config)
            config.update(fields)
        refuse_unknown_kwargs(kwargs)
        if config._attn_implementation is not None:  # AutoModel moves the argument into the config
            base_kwargs.setdefault("attn_implementation", config._attn_implementation)
            config._attn_implementation = None
        for name in ("trust_remote_code", "code_revision"):  # for whoever finds the class
            kwargs.pop(name, None)
        with without_base():
            model, info = cls._load_own(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        base = load_base(model.config, pretrained_model_name_or_path, files, **hub_kwargs, **base_kwargs)
        check_fingerprint(model.config, base, pretrained_model_name_or_path, **hub_kwargs, **files)
        model.attach_base(base, drop_full)
        return (model, info) if output_loading_info else model

    @classmethod
    def _load_own(cls, artifact: str | os.PathLike, *model_args: Any, **kwargs: Any) -> tuple[Any, dict]:
        with readable_weights(os.path.join(artifact, kwargs.get("subfolder") or "")):
            loaded: Any = super().from_pretrained(
                artifact,
                *model_args,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, with the other keys that are wrong
                dtype=torch.float32,
                use_safetensors=True,
                **kwargs,
            )
        model, info = loaded
        wrong = {name: sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        if any(wrong.values()):
            details = "; ".join(f"{name.replace('_', ' ')}: {', '.join(keys[:4])}" for name, keys in wrong.items() if keys)
            raise ValueError(
                f"the weights in {str(artifact)!r} don't belong to a {kwargs['config'].controller!r} controller of this "
                f"base: {details}"
            )
        return model, info

    def save_pretrained(self, save_directory: str | os.PathLike, tokenizer: Any = None, **kwargs: Any) -> None:
        """Write an artifact: config, our modules (no base weight), the code, generation config and the tokenizer, if given.

        Args:
            save_directory: folder to write to.
            tokenizer: saved into the same folder.
            kwargs: as in `PreTrainedModel.save_pretrained`.

        Raises:
            ValueError: the configuration names no base, so what is saved could not be loaded.
        """
        if not self.config.base_model_name_or_path:
            raise ValueError(
                "the configuration names no base model, so what is saved could not be loaded: save the base, and pass "
                "base_model_name_or_path=... (a folder or a Hub name) to from_base, or set it in the model's config"
            )
        if not getattr(self, "_hf_peft_config_loaded", False):  # then transformers saves adapters alone, in the base or not
            state = kwargs.get("state_dict") or self._own_state()
            kwargs["state_dict"] = {name: value for name, value in state.items() if not name.startswith("base.")}
        if not same_base(self.config.base_fingerprint, fingerprint(self.base)):
            logger.warning_once(
                "the base is other than the one that the configuration names (changed weights, or adapters in it), and an "
                "artifact holds nothing of it: save what was changed with the library that changed it"
            )
        super().save_pretrained(save_directory, **kwargs)
        if tokenizer is not None:
            tokenizer.save_pretrained(save_directory)

    def _own_state(self) -> dict[str, Tensor]:
        """The state without the base's, which is not made: that may unpack weights."""
        return {f"{name}.{key}": value for name, module in self._own() for key, value in module.state_dict().items()}

    def _own(self) -> Iterator[tuple[str, nn.Module]]:
        """Our modules by their names."""
        return ((name, module) for name, module in self.named_children() if name != "base")

    def attach_base(self, base: PreTrainedModel, drop_full: bool = False) -> None:
        """Hold a base by reference, frozen and in eval mode; with `drop_full` without its own weights, see `from_base`.

        Raises:
            ValueError: an unknown family, a shape other than the configuration's, layers on several accelerators, or weights
                that can't be dropped.
        """
        check_base(base, self.takes_encoders)
        check_device_map(base)
        for name in ("num_hidden_layers", "hidden_size"):
            expected, found = getattr(self.config.text_config, name), getattr(base.config, name)
            if expected != found:
                raise ValueError(f"the base has {name}={found}, but the configuration is for a base with {name}={expected}")
        drop = what_to_drop(self.config, self.controller) if drop_full else None
        device = running_device(base)
        self.stack = take_apart(base, drop, self.corrections.to(device), self.orders.to(device))
        self.base = base
        for _, module in self._own():
            module.to(self.device)
        self._bind()
        if self.can_generate():
            adopt_generation_config(self, base)

    def prepare(self) -> None:
        """Take the base apart again if it is no longer what it was; every forward asks first, in `generate` only its first.

        So these count from the next forward or `generate` on: a base that was moved, cast or offloaded, other weights, biases,
        modules (LoRA of PEFT, say), hooks, embeddings or heads, another attention implementation. The modules that hold those
        parts (layers, attention, the decoder, the base itself) are never called, so hooks or forwards of others are refused
        there.

        Raises:
            ValueError: what can't be run as the base would; says what and where.
        """
        state = generation_of(self)
        if state is not None and state.prepared:  # looking takes a twentieth of the time of a token in 4 bits
            return
        if self.base is not self.stack.base:
            raise ValueError("the attribute base was set to another model, which has no effect: use attach_base(base)")
        if self.stack.changed:
            self.stack.prepare()
            self._bind()
        if state is not None:
            state.prepared = True

    @torch.inference_mode(False)
    def _bind(self) -> None:
        """Tell everything of ours what the base's parts are and cost."""
        self.costs = self.stack.measure_costs(
            hardware_of(self.config.cost_unit, self.config.prices), self.bridges, self.config.table
        )
        upgrade(self.config, self.costs.head)
        check_dial(self.config, self.costs)
        self.controller.bind(self.costs)
        self.executor = Executor(self.stack, self.controller, self.bridges, self.costs, self.config.table)
        adopt(self, self.base)

    def _init_weights(self, module: nn.Module) -> None:
        # transformers asks only about modules that have tensors of their own: of a bridge about its two maps.
        if isinstance(module, Controller | nn.Linear):
            module.reset_parameters()

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """As that of torch, which moves or casts one tensor after the other: what can't be is refused before the first."""
        dropped = (weight for weight in self.parameters() if isinstance(weight, DroppedWeight))
        if (weight := next(dropped, None)) is not None:
            fn(weight)
        return super()._apply(fn, *args, **kwargs)

    @property
    def held_bytes(self) -> dict[str, int]:
        """Bytes of weights in memory: `embeddings`, the rest of the `base`, our `own`, and each variant by its name.

        What many rows need of a variant of 4 bits is made, and counts, when many rows first come.
        """
        return held_bytes(self.stack, [module for _, module in self._own()])

    # What a transformers model answers

    @property
    def dtype(self) -> torch.dtype:
        """The base's dtype."""
        return self.base.dtype if "base" in self._modules else super().dtype

    @property
    def device(self) -> torch.device:
        """The base's device: the one where it runs, if its weights are offloaded."""
        return running_device(self.base) if "base" in self._modules else super().device

    def get_input_embeddings(self) -> nn.Module:
        """The base's token embeddings."""
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The base's head."""
        return self.base.get_output_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Give the base other token embeddings."""
        self.base.set_input_embeddings(value)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Give the base another head."""
        self.base.set_output_embeddings(new_embeddings)

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """Give the base another attention implementation: a name, or a dict with one for `"text_config"` (or `""`).

        Raises:
            ValueError: one that this base, or we, can't run; it then keeps what it has.
        """
        before = self.base.config._attn_implementation
        if isinstance(attn_implementation, dict):
            attn_implementation = attn_implementation.get("text_config", attn_implementation.get("", before))
        self.base.set_attn_implementation(attn_implementation, *args, **kwargs)
        try:
            self.prepare()
        except ValueError:
            self.base.set_attn_implementation(before)
            raise

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refused: the base is not ours to change, and the change would not be saved."""
        raise ValueError("resize_token_embeddings is not possible: the base is frozen and not saved; resize it before wrapping")

    def train(self, mode: bool = True) -> Any:
        """Training mode of our own modules; the base stays in eval mode."""
        super().train(mode)
        if "base" in self._modules:
            self.base.eval()
        return self
