"""The sizes and settings of an SMA model."""

from dataclasses import dataclass, field

from sma_fast.masking.sma import SMAMasking


@dataclass
class SMAConfig:
    """Sizes of an SMA model; names as in the authors' config.json, defaults as for language.

    Args:
        input_type: "discrete" (token ids) or "continuous" (values).
        num_discrete_tokens: vocabulary. Bytes: 6 special tokens + 256.
        input_channels: channels of a continuous token.
        max_position_embeddings: the longest input.
        embedded_channels: E, width of the embedding.
        encoder_type: "cross_attention": latents attend to tokens; "self_attention": tokens attend
            to each other, `embedded_channels` wide, without latents.
        num_latents: M.
        latent_channels: C.
        num_blocks: how often the block of layers is repeated, with the same weights.
        num_self_attends_per_block: layers after the first.
        num_self_attention_heads: heads of these layers.
        num_cross_attention_heads: heads of the first layer.
        qk_channels: width of queries and keys. Default: C.
        v_channels: width of values. Default: C.
        encoder_cross_attention_channels: width of queries and keys in the first layer. Default:
            `qk_channels`.
        self_attention_widening_factor: MLP width over C in the layers after the first.
        cross_attention_widening_factor: MLP width over C in the first layer.
        dense_use_bias: whether projections have a bias.
        attention_dropout_prob: on attention weights, in [0, 1).
        hidden_dropout_prob: on embeddings and the two outputs of a layer, in [0, 1).
        drop_path_prob: chance that a sample skips a branch of the last layer, in [0, 1); it grows
            from 0 at the first layer, as in stochastic depth (arXiv 1603.09382).
        initializer_range: standard deviation of initial weights.
        pe_initializer_range: standard deviation of initial position embeddings.
        decoder_channels: width of decoder queries and values. Default: E.
        decoder_qk_channels: width of the decoder's projected queries and keys. Default:
            `decoder_channels`.
        decoder_heads: heads of the decoder.
        decoder_widening_factor: MLP width over `decoder_channels`.
        share_decoder_queries: decoder queries are the position embeddings, not their own table.
        share_embedding_weights: discrete output through the token table, where widths agree.
        masking: SMAMasking, or a dict of its arguments.
        num_labels: outputs of SMAForPrediction.
        problem_type: of SMAForPrediction: "single_label_classification",
            "multi_label_classification" or "regression".

    Raises:
        ValueError: naming the field, what was given and what is allowed.

    Source: Self-Guided Masked Autoencoders (arXiv 2402.14789), appendix.
    """

    input_type: str = "discrete"
    num_discrete_tokens: int = 262
    input_channels: int = 1
    max_position_embeddings: int = 1024
    embedded_channels: int = 512
    encoder_type: str = "cross_attention"
    num_latents: int = 256
    latent_channels: int = 1024
    num_blocks: int = 1
    num_self_attends_per_block: int = 16
    num_self_attention_heads: int = 8
    num_cross_attention_heads: int = 8
    qk_channels: int | None = None
    v_channels: int | None = None
    encoder_cross_attention_channels: int | None = None
    self_attention_widening_factor: int = 1
    cross_attention_widening_factor: int = 1
    dense_use_bias: bool = True
    attention_dropout_prob: float = 0.0
    hidden_dropout_prob: float = 0.0
    drop_path_prob: float = 0.0
    initializer_range: float = 0.02
    pe_initializer_range: float = 0.02
    decoder_channels: int | None = None
    decoder_qk_channels: int | None = None
    decoder_heads: int = 8
    decoder_widening_factor: int = 1
    share_decoder_queries: bool = True
    share_embedding_weights: bool = True
    masking: SMAMasking = field(default_factory=SMAMasking)
    num_labels: int = 2
    problem_type: str = "single_label_classification"

    def __post_init__(self) -> None:
        self.qk_channels = self.qk_channels or self.latent_channels
        self.v_channels = self.v_channels or self.latent_channels
        self.encoder_cross_attention_channels = (
            self.encoder_cross_attention_channels or self.qk_channels
        )
        self.decoder_channels = self.decoder_channels or self.embedded_channels
        self.decoder_qk_channels = self.decoder_qk_channels or self.decoder_channels
        if isinstance(self.masking, dict):
            self.masking = SMAMasking(**self.masking)
        _check_field(self, "input_type", ("discrete", "continuous"))
        _check_field(self, "encoder_type", ("cross_attention", "self_attention"))
        _check_field(
            self,
            "problem_type",
            ("single_label_classification", "multi_label_classification", "regression"),
        )
        if self.encoder_type == "self_attention" and self.embedded_channels != self.latent_channels:
            raise ValueError(
                f"embedded_channels: got {self.embedded_channels}, allowed is latent_channels "
                f"({self.latent_channels}) with encoder_type 'self_attention'"
            )
        for name in ("attention_dropout_prob", "hidden_dropout_prob", "drop_path_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, allowed is [0, 1)")
        for name, heads in (
            ("qk_channels", "num_self_attention_heads"),
            ("v_channels", "num_self_attention_heads"),
            ("v_channels", "num_cross_attention_heads"),
            ("encoder_cross_attention_channels", "num_cross_attention_heads"),
            ("decoder_channels", "decoder_heads"),
            ("decoder_qk_channels", "decoder_heads"),
        ):
            width, parts = getattr(self, name), getattr(self, heads)
            if parts < 1 or width < 1 or width % parts:
                raise ValueError(f"{name}: got {width}, allowed is a multiple of {heads} ({parts})")
        for name in (
            "num_discrete_tokens",
            "input_channels",
            "max_position_embeddings",
            "embedded_channels",
            "num_latents",
            "latent_channels",
            "num_blocks",
            "num_labels",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, allowed is at least 1")
        for name, least in (
            ("num_self_attends_per_block", 0),
            ("self_attention_widening_factor", 1),
            ("cross_attention_widening_factor", 1),
            ("decoder_widening_factor", 1),
            ("initializer_range", 0),
            ("pe_initializer_range", 0),
        ):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}: got {getattr(self, name)}, allowed is at least {least}")
        if self.share_decoder_queries and self.decoder_channels != self.embedded_channels:
            raise ValueError(
                f"decoder_channels: got {self.decoder_channels}, allowed is embedded_channels "
                f"({self.embedded_channels}) with share_decoder_queries"
            )


def _check_field(config: SMAConfig, name: str, allowed: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, allowed is {', '.join(map(repr, allowed))}")
