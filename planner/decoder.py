"""The decoder that most families share: Llama, with a few things changed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from vramplan.planner.construction import assemble, bare, embedding, head_sizes, linear, norm
from vramplan.planner.layers import Architecture, Attention, Layer, Mla, Mlp, Module, Moe
from vramplan.planner.patterns import no_window, rope_everywhere, sparse_everywhere

if TYPE_CHECKING:
    from collections.abc import Callable

    from vramplan.planner.configuration import Config

PRE = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
POST = {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
SANDWICH = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
SANDWICH_GLM4 = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention_post_norm": "post_self_attn_layernorm",
    "mlp_post_norm": "post_mlp_layernorm",
}
PARALLEL = {"attention_norm": "input_layernorm", "mlp_norm": "input_layernorm"}


@dataclass(frozen=True, slots=True)
class Experts:
    """How a family builds its mixture of experts; the defaults are Mixtral's."""

    path: str = "mlp"
    router: str = "gate"
    router_bias: bool = False
    router_linear: bool = False  # a subclass of nn.Linear instead of a module with a bare weight
    router_first: bool = True
    wide_router: bool = False  # its weight is float32 in a model of any dtype
    expert_bias: bool = False
    transposed: bool = False  # experts as (E, in, out) instead of (E, out, in)
    count: str = "num_local_experts"
    width: str = "intermediate_size"
    shared: str | None = None  # path of the shared expert inside the block
    shared_width: str | None = None  # its own width; otherwise `width` times shared_count
    shared_count: str | None = None
    shared_gate: str | None = None
    sparse: Callable[[Config, int], list[bool]] = sparse_everywhere


@dataclass(frozen=True, slots=True)
class Decoder:
    """A decoder shaped like Llama; the defaults are Llama's. Flags given as a string name a field of the config."""

    # attention
    qkv_bias: bool | str = "attention_bias"
    out_bias: bool | str = "attention_bias"
    out: str = "o_proj"
    fused: bool = False  # one qkv_proj, registered after o_proj (phi3)
    latent: bool = False  # DeepSeek's multi-head latent attention
    sinks: bool = False
    q_norm: str = "q_norm"
    k_norm: str = "k_norm"
    # "each": every head has a norm module of its own; "rows": one module whose weight is (heads, head_dim)
    qk_norm: Literal["none", "head", "all", "each", "rows"] = "none"
    qk_norm_if: str | None = None
    own_head_dim: bool = True  # reads head_dim from the config
    whole_heads: bool = False  # hidden_size must divide by the heads even where head_dim is given
    windows: Callable[[Config, int], list[int | None]] = no_window
    rotates: Callable[[Config, int, list[int | None]], list[bool]] = rope_everywhere
    rope: str = "llama"
    rotary_share: float | None = None  # None: whole heads rotate; else the default of partial_rotary_factor
    attention_softcapping: bool = False
    # MLP
    mlp: Literal["gated", "fused", "plain"] = "gated"
    mlp_bias: bool | str = False
    mlp_path: str = "mlp"
    mlp_names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    mlp_width: str = "intermediate_size"
    activation: str = "hidden_act"
    experts: Experts | None = None
    # the layer and what surrounds it
    norms: dict[str, str] = field(default_factory=lambda: PRE)
    norm: str = "llama_rms_norm"
    norm_weight: bool = True
    norm_bias: bool = False
    parallel: bool | str = False
    order: tuple[Literal["attention", "mlp", "norms"], ...] = ("attention", "mlp", "norms")
    scaled_residual: bool = False
    embedding_scale: bool = False
    logit_scale: bool = False
    final_softcapping: bool = False
    final_norm: str = "norm"
    head_bias: bool | str = False
    attention_output_dropout: str | None = None
    mlp_dropout: str | None = None
    embedding_dropout: str | None = None

    def __call__(self, config: Config) -> Architecture:
        """Builds the architecture that this config describes."""
        layers = config.size("num_hidden_layers")
        hidden = config.size("hidden_size")
        vocabulary = config.size("vocab_size")
        windows = self.windows(config, layers)
        rotates = self.rotates(config, layers, windows)
        sparse = self.experts.sparse(config, layers) if self.experts else [False] * layers
        kinds, order = _distinct(list(zip(windows, rotates, sparse, strict=True)))
        softcapping = config.optional_number("final_logit_softcapping") if self.final_softcapping else None
        return assemble(
            config,
            before=(embedding("model.embed_tokens", vocabulary, hidden),),
            kinds=self._layers(config, hidden, kinds),
            order=order,
            after=(self._norm(f"model.{self.final_norm}", hidden),),
            head_bias=_flag(config, self.head_bias),
            embedding_scale=self.embedding_scale,
            embedding_dropout=config.probability(self.embedding_dropout) if self.embedding_dropout else 0.0,
            logit_scale=self.logit_scale,
            final_logit_softcapping=softcapping,
        )

    def _layers(self, config: Config, hidden: int, kinds: list[tuple[Any, ...]]) -> tuple[Layer, ...]:
        attention_modules, attention = self._latent(config, hidden) if self.latent else self._attention(config, hidden)
        names = dict.fromkeys(self.norms.values())
        parallel = _flag(config, self.parallel)
        wiring: dict[str, Any] = self.norms
        if parallel and self.norms is not PARALLEL:  # stablelm, phi: one norm feeds both branches
            names, wiring = {"input_layernorm": None}, PARALLEL
        norms = [self._norm(name, hidden) for name in names]
        built = []
        for window, rotated, sparse in kinds:
            mlp_modules, mlp = self._sparse(config, hidden) if sparse else self._dense(config, hidden)
            parts = {"attention": attention_modules, "mlp": mlp_modules, "norms": norms}
            built.append(
                Layer(
                    modules=tuple(module for part in self.order for module in parts[part]),
                    attention=replace(
                        attention,
                        sliding_window=window,
                        rotary_dim=attention.rotary_dim if rotated else 0,
                        position="rotary" if rotated else "none",
                    ),
                    mlp=mlp,
                    parallel=parallel,
                    scaled_residual=self.scaled_residual,
                    **wiring,
                )
            )
        return tuple(built)

    def _norm(self, name: str, shape: int | tuple[int, ...]) -> Module:
        return norm(name, shape, self.norm, weight=self.norm_weight, bias=self.norm_bias)

    def _attention(self, config: Config, hidden: int) -> tuple[list[Module], Attention]:
        heads, kv_heads, head_dim = head_sizes(config, hidden, own_head_dim=self.own_head_dim, whole=self.whole_heads)
        bias, out_bias = _flag(config, self.qkv_bias), _flag(config, self.out_bias)
        path = "self_attn."
        q, k, v, out = f"{path}q_proj", f"{path}k_proj", f"{path}v_proj", f"{path}{self.out}"
        out_module = linear(out, heads * head_dim, hidden, "attention", bias=out_bias)
        if self.fused:
            qkv = f"{path}qkv_proj"
            width = (heads + 2 * kv_heads) * head_dim
            modules = [out_module, linear(qkv, hidden, width, "attention", bias=bias)]
        else:
            modules = [
                linear(q, hidden, heads * head_dim, "attention", bias=bias),
                linear(k, hidden, kv_heads * head_dim, "attention", bias=bias),
                linear(v, hidden, kv_heads * head_dim, "attention", bias=bias),
                out_module,
            ]
        if self.sinks:
            modules.insert(0, bare("self_attn", "parameter", "attention", sinks=(heads,)))
        normed = self.qk_norm if self.qk_norm_if is None or config.flag(self.qk_norm_if) else "none"
        over: Literal["none", "head", "all"] = "head" if normed in ("each", "rows") else normed  # type: ignore[assignment]
        q_norm, k_norm = f"{path}{self.q_norm}", f"{path}{self.k_norm}"
        if normed == "each":
            modules += [norm(f"{q_norm}.norms.{i}", head_dim, self.norm) for i in range(heads)]
            modules += [norm(f"{k_norm}.norms.{i}", head_dim, self.norm) for i in range(kv_heads)]
            q_norm, k_norm = f"{q_norm}.norms.0", f"{k_norm}.norms.0"
        elif normed != "none":
            for name, count in ((q_norm, heads), (k_norm, kv_heads)):
                shape = {"head": (head_dim,), "all": (count * head_dim,), "rows": (count, head_dim)}[normed]
                modules.append(self._norm(name, shape))
        share = 1.0 if self.rotary_share is None else config.rotary_factor(self.rotary_share)
        attention = Attention(
            num_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            value_head_dim=head_dim,
            rotary_dim=int(head_dim * share),
            position="rotary",
            q=None if self.fused else q,
            k=None if self.fused else k,
            v=None if self.fused else v,
            qkv=f"{path}qkv_proj" if self.fused else None,
            o=out,
            q_norm=q_norm if normed != "none" else None,
            k_norm=k_norm if normed != "none" else None,
            qk_norm_over=over,
            logit_softcapping=config.optional_number("attn_logit_softcapping") if self.attention_softcapping else None,
            sinks=self.sinks,
            dropout=config.probability("attention_dropout"),
            output_dropout=config.probability(self.attention_output_dropout) if self.attention_output_dropout else 0.0,
            rope=self.rope,
        )
        return modules, attention

    def _latent(self, config: Config, hidden: int) -> tuple[list[Module], Attention]:
        heads = config.size("num_attention_heads")
        if (config.optional_size("num_key_value_heads") or heads) != heads:
            raise config.wrong(
                "num_key_value_heads", config.raw("num_key_value_heads"), f"num_attention_heads, {heads}"
            )
        rank, kv_rank = config.optional_size("q_lora_rank"), config.size("kv_lora_rank")
        nope, rotary, value = (config.size(n) for n in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        bias = _flag(config, self.qkv_bias)
        path = "self_attn."
        if rank is None:
            modules = [linear(f"{path}q_proj", hidden, heads * (nope + rotary), "attention")]
        else:
            modules = [
                linear(f"{path}q_a_proj", hidden, rank, "attention", bias=bias),
                self._norm(f"{path}q_a_layernorm", rank),
                linear(f"{path}q_b_proj", rank, heads * (nope + rotary), "attention"),
            ]
        modules += [
            linear(f"{path}kv_a_proj_with_mqa", hidden, kv_rank + rotary, "attention", bias=bias),
            self._norm(f"{path}kv_a_layernorm", kv_rank),
            linear(f"{path}kv_b_proj", kv_rank, heads * (nope + value), "attention"),
            linear(f"{path}o_proj", heads * value, hidden, "attention", bias=bias),
        ]
        mla = Mla(
            q_a=f"{path}q_a_proj" if rank else None,
            q_a_norm=f"{path}q_a_layernorm" if rank else None,
            q_b=f"{path}q_b_proj" if rank else None,
            kv_a=f"{path}kv_a_proj_with_mqa",
            kv_a_norm=f"{path}kv_a_layernorm",
            kv_b=f"{path}kv_b_proj",
            qk_nope_head_dim=nope,
            qk_rope_head_dim=rotary,
            kv_lora_rank=kv_rank,
            q_lora_rank=rank,
        )
        attention = Attention(
            num_heads=heads,
            num_key_value_heads=heads,  # the latent is expanded to every head
            head_dim=nope + rotary,
            value_head_dim=value,
            rotary_dim=rotary,
            position="rotary",
            q=None if rank else f"{path}q_proj",
            k=None,
            v=None,
            qkv=None,
            o=f"{path}o_proj",
            mla=mla,
            dropout=config.probability("attention_dropout"),
            rope=self.rope,
        )
        return modules, attention

    def _dense(self, config: Config, hidden: int) -> tuple[list[Module], Mlp]:
        return self._mlp(config, hidden, config.size(self.mlp_width), self.mlp_path)

    def _mlp(self, config: Config, hidden: int, width: int, path: str) -> tuple[list[Module], Mlp]:
        bias = _flag(config, self.mlp_bias)
        names = [f"{path}.{name}" for name in self.mlp_names]
        activation = config.text(self.activation)
        *inputs, down = names
        widths = [2 * width if self.mlp == "fused" else width] * len(inputs)
        modules = [linear(name, hidden, w, "mlp", bias=bias) for name, w in zip(inputs, widths, strict=True)]
        modules.append(linear(down, width, hidden, "mlp", bias=bias))
        if activation == "xielu":
            modules.append(bare(f"{path}.act_fn", "parameter", "mlp", alpha_p=(1,), alpha_n=(1,)))
        mlp = Mlp(
            gate=inputs[0] if self.mlp == "gated" else None,
            up=inputs[-1] if self.mlp != "fused" else None,
            gate_up=inputs[0] if self.mlp == "fused" else None,
            down=down,
            activation=activation,
            intermediate_size=width,
            dropout=config.probability(self.mlp_dropout) if self.mlp_dropout else 0.0,
        )
        return modules, mlp

    def _sparse(self, config: Config, hidden: int) -> tuple[list[Module], Moe]:
        how = self.experts
        assert how is not None
        count, width = config.size(how.count), config.size(how.width)
        top_k = config.size("num_experts_per_tok")
        if top_k > count:
            raise config.wrong("num_experts_per_tok", top_k, f"at most {how.count}, which is {count}")
        router_shapes: dict[str, tuple[int, ...]] = {"weight": (count, hidden)}
        if how.router_bias:
            router_shapes["bias"] = (count,)
        gate_up, down = (count, 2 * width, hidden), (count, hidden, width)
        if how.transposed:
            gate_up, down = (count, hidden, 2 * width), (count, width, hidden)
        expert_shapes: dict[str, tuple[int, ...]] = {"gate_up_proj": gate_up, "down_proj": down}
        if how.expert_bias:
            expert_shapes = {
                "gate_up_proj": gate_up,
                "gate_up_proj_bias": (count, 2 * width),
                "down_proj": down,
                "down_proj_bias": (count, hidden),
            }
        router, experts = f"{how.path}.{how.router}", f"{how.path}.experts"
        modules = [
            bare(router, "router", "router", how.wide_router, **router_shapes),
            bare(experts, "experts", "experts", **expert_shapes),
        ]
        if how.router_linear:
            modules[0] = linear(router, hidden, count, "router", variant="router_linear")
        if not how.router_first:
            modules.reverse()
        shared, shared_gate = None, None
        if how.shared:
            times = config.size(how.shared_count) if how.shared_count else 1
            shared_width = config.size(how.shared_width) if how.shared_width else times * width
            shared_modules, shared = self._mlp(config, hidden, shared_width, how.shared)
            modules += shared_modules
        if how.shared_gate:
            shared_gate = f"{how.path}.{how.shared_gate}"
            modules.append(linear(shared_gate, hidden, 1, "router"))
        moe = Moe(router, experts, count, top_k, width, config.text(self.activation), shared, shared_gate)
        return modules, moe


def _flag(config: Config, flag: bool | str) -> bool:
    return config.flag(flag) if isinstance(flag, str) else flag


def _distinct(signatures: list[tuple[Any, ...]]) -> tuple[list[tuple[Any, ...]], tuple[int, ...]]:
    """The distinct signatures in order of appearance, and for each layer the index of its own."""
    kinds = {signature: index for index, signature in enumerate(dict.fromkeys(signatures))}
    return list(kinds), tuple(kinds[signature] for signature in signatures)
