"""The schema of a run: dataclasses with range checks; unknown keys are refused.

Imports neither torch nor wandb, so that a bad configuration is answered at once.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import field, fields, is_dataclass, replace
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from src.errors import UserError

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1)]
Depth = Annotated[int, Field(strict=True, ge=1, le=1000)]
Real = Annotated[float, Field(strict=True)]
NonNegative = Annotated[float, Field(strict=True, ge=0)]
Positive = Annotated[float, Field(strict=True, gt=0)]
Depths = Annotated[list[Depth], Field(min_length=1)]
Variances = Annotated[list[NonNegative], Field(min_length=1)]
Counts = Annotated[list[Count], Field(min_length=1)]
Activation = Literal["tanh", "sigmoid", "relu", "linear"]
Norm = Literal["none", "batch", "layer"]
Skip = Literal["none", "original", "preactivation"]
UNSET = cast(Any, None)
ScaleName = Literal["smoke", "quick", "paper"]
Pair = Annotated[list[str], Field(min_length=2, max_length=2)]


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """A network of `depth` weight layers, the readout among them.

    Weights have variance σw²/fan_in (or are σw times an orthogonal matrix), biases variance σb².
    """

    family: Literal["mlp", "residual_mlp", "cifar", "vgg"]
    depth: Depth
    width: Count
    activation: Activation
    init: Literal["gaussian", "orthogonal"]
    weight_var: NonNegative
    bias_var: NonNegative
    norm: Norm
    skip: Skip
    branch_scale: NonNegative

    @model_validator(mode="after")
    def _family_allows(self) -> "ModelConfig":
        if self.skip != "none" and self.family in ("mlp", "vgg"):
            raise ValueError(f"family {self.family} has no skip connections; use residual_mlp or cifar, or skip=none")
        if self.family == "residual_mlp" and (self.depth < 4 or self.depth % 2):
            raise ValueError(f"depth {self.depth}: a residual MLP has 2n+2 weight layers, n ≥ 1 (4, 6, 8, …)")
        if self.family == "cifar" and (self.depth < 8 or self.depth % 6 != 2):
            raise ValueError(f"depth {self.depth}: a CIFAR net has 6n+2 weight layers, n ≥ 1 (8, 14, 20, …)")
        if self.family == "vgg" and self.depth != 8:
            raise ValueError(f"depth {self.depth}: the VGG-like net has 8 weight layers")
        if self.norm == "layer" and self.family in ("cifar", "vgg"):
            raise ValueError(f"family {self.family} takes norm none or batch, not layer")
        return self


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """Which images, where they lie, where they come from, and how many are used."""

    name: Literal["mnist", "fashion_mnist", "cifar10", "cifar100", "digits"]
    root: Annotated[str, Field(min_length=1)]
    mirrors: list[str]
    fallback: Literal["none", "digits"]
    train_size: Count | None
    test_size: Count | None
    augment: list[Literal["crop", "flip", "cutout"]] = field(default_factory=list)  # of the training images, in this order


@dataclass(frozen=True, config=STRICT)
class TrainingConfig:
    """Plain backpropagation: optimiser, schedule, length and arithmetic."""

    optimizer: Literal["sgd", "adam"]
    lr: Positive
    momentum: Annotated[float, Field(strict=True, ge=0, lt=1)]
    weight_decay: NonNegative
    batch_size: Count
    epochs: Count
    max_steps: Count | None
    schedule: Literal["cosine", "constant", "steps", "warm_steps"]
    precision: Literal["float32", "tf32", "bf16"]
    ensemble: Literal["auto"] | Count = "auto"  # how many networks train as one batched network, where an experiment trains several alike


Settings = TypeVar("Settings", ModelConfig, TrainingConfig)


@dataclass(frozen=True, config=STRICT)
class ScaleConfig:
    """How much is run: seconds, a minute or two on two cores, or one GPU."""

    name: ScaleName


@dataclass(frozen=True, config=STRICT)
class TrackerConfig:
    """Weights & Biases: offline unless asked for."""

    mode: Literal["offline", "online", "none"]
    project: Annotated[str, Field(min_length=1)]
    entity: str | None
    group: str | None = None  # None: the experiment's name; a sweep sets its own


@dataclass(frozen=True, config=STRICT)
class ClusterConfig:
    """How the runs of a sweep share jobs; what a job is given stands under hydra.launcher."""

    jobs: Count  # into so many jobs at most a sweep is split
    at_once: Count | None  # runs that a job works on at the same time, sharing its GPUs; None: one a CPU
    runs: dict[ScaleName, Count] = field(default_factory=dict)  # a job's fewest, by scale (1): short ones share its start


@dataclass(frozen=True, config=STRICT)
class ClaimConfig:
    """The claim in the specification's words, and where it stands there."""

    name: str
    title: str
    heading: str
    statement: str


@dataclass(frozen=True, config=STRICT)
class Criterion:
    """When one form of the claim holds: the estimate of every cell lies in [at_least, at_most].

    `within` is a query over the cells' columns: the cells that the form speaks of at all. `condition` is another: where it is given the
    form is claimed only where it is met, and with `otherwise: outside` to be wrong wherever else. `given` has the further numbers that
    decide, by name: thresholds that a cell is made with. They are printed with the criterion. `amended` tells what was changed of a
    criterion after its first data: when, from what, with which verdict then, and why.
    """

    form: Literal["as_stated", "precise"]
    statement: str
    criterion: str
    at_least: Real | None = None
    at_most: Real | None = None
    condition: str | None = None
    given: dict[str, Real] = field(default_factory=dict)
    within: str | None = None
    otherwise: Literal["outside"] | None = None
    amended: list[str] = field(default_factory=list)

    @model_validator(mode="after")
    def _has_a_limit(self) -> "Criterion":
        if self.at_least is None and self.at_most is None:
            raise ValueError("needs at_least, at_most or both")
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(f"at_least {self.at_least} exceeds at_most {self.at_most}")
        if self.otherwise and self.condition is None:
            raise ValueError("otherwise needs a condition")
        return self


@dataclass(frozen=True, config=STRICT)
class ReportedNet:
    """A net of a publication: how it differs from the run's model and training, and the test error it is reported to have.

    `published` is in percent, `published_above` a bound that the error is reported to exceed; both None where no number is given.
    `model` and `training` are keys of the run's own that this net has otherwise.
    """

    name: Annotated[str, Field(min_length=1)]
    data: Literal["mnist", "cifar10"]  # of the report
    published: Positive | None = None
    published_above: Positive | None = None
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    start: Literal["drawn", "uniform"] = "drawn"  # uniform: U[−1/√n, 1/√n] (Glorot & Bengio 2010, equation 1)
    loss: Literal["backprop", "pred", "sim", "predsim"] = "backprop"  # of every layer, or of the whole
    auxiliary: Annotated[int, Field(strict=True, ge=0)] = 0  # hidden layers of the classifier at every layer
    sequential: Flag = False  # one layer after the other, each for all steps
    exit_weight: Positive | None = None  # of a classifier at every layer beside the whole's loss, fading to 0

    @model_validator(mode="after")
    def _one_way_to_train(self) -> "ReportedNet":
        if self.loss == "backprop" and (self.auxiliary or self.sequential):
            raise ValueError(f"{self.name}: auxiliary and sequential speak of local losses, not of backprop")
        if self.loss != "backprop" and self.exit_weight is not None:
            raise ValueError(f"{self.name}: exit_weight goes with backprop, not with local losses")
        return self


@dataclass(frozen=True, config=STRICT)
class Grid:
    """The axes that experiments vary. An experiment's file sets those that it has and reads no other: the rest are None."""

    seeds: Count = UNSET  # random networks a setting
    certified_seeds: Count = UNSET  # of them certified
    samples: Count = UNSET  # inputs that a network is measured on
    calibration: Count = UNSET  # training images that set the statistics of batch normalisation
    depths: Depths = UNSET
    block_depth: Depth = UNSET  # of the networks measured block by block
    rate_depth: Depth = UNSET  # of the networks whose rate a layer is measured
    weight_vars: Variances = UNSET
    branch_scales: Variances = UNSET
    train_seeds: Count = UNSET
    train_depths: Depths = UNSET
    train_width: Count = UNSET
    layer_norm_depths: Depths = UNSET  # of the chains with layer normalisation trained beside them
    depth_steps: Count = UNSET  # of the trainings compared over depth
    train_weight_vars: Variances = UNSET
    widths: Counts = UNSET  # units of a hidden layer
    batch_sizes: Counts = UNSET  # images that a batch gradient is taken over
    activations: Annotated[list[Activation], Field(min_length=1)] = UNSET
    train_batch_sizes: Counts = UNSET  # of the trainings compared
    conv_width: Count = UNSET  # channels of the convolutional nets whose Jacobians are written out
    product_width: Count = UNSET  # units of the deep nets whose product of Jacobians is followed
    exit_weights: Variances = UNSET  # α_l of the auxiliary losses
    exit_spacings: Counts = UNSET  # k: an exit at every k-th stage
    conv_widths: list[Count] = UNSET  # channels of the convolutional nets; none where they are not trained
    gains: Variances = UNSET  # σw² in units of its critical value, at which χ = 1
    bias_vars: Variances = UNSET  # σb²
    long_depths: Depths = UNSET  # of the networks whose long training is followed step by step
    long_width: Count = UNSET
    long_seeds: Count = UNSET
    long_steps: Count = UNSET
    long_lr: Positive = UNSET
    block_sizes: Counts = UNSET  # stages of a block that is trained by a loss of its own
    similarity_blocks: Counts = UNSET  # those of them that losses on similarities are trained at
    auxiliary_layers: Counts = UNSET  # hidden layers of an auxiliary classifier
    places: Depths = UNSET  # l of the layer that is the bottleneck
    bottleneck_ranks: Counts = UNSET  # of that layer
    code_widths: Counts = UNSET  # units of the code
    rates: Annotated[list[Positive], Field(min_length=1)] = UNSET  # learning rates that one is chosen from, in units of training.lr
    adam_rates: Annotated[list[Positive], Field(min_length=1)] = UNSET  # the same of Adam, as they are
    paper: Annotated[str, Field(pattern="^[a-z]+[0-9]{4}$")] = UNSET  # that is reproduced: the name of its file
    source: Annotated[str, Field(min_length=1)] = UNSET  # of what it reports: authors, year, table or figure
    leaves_out: list[str] = UNSET  # what of the authors' recipe is not done here, at any scale
    nets: Annotated[list[ReportedNet], Field(min_length=1)] = UNSET
    trained: list[str] = UNSET  # of these nets; none: all
    orders: dict[str, Annotated[list[Pair], Field(min_length=1)]] = UNSET  # by criterion: nets, the better first


@dataclass(frozen=True, config=STRICT)
class Config:
    """Everything that decides a run."""

    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)]
    device: Literal["auto", "cpu", "cuda"]
    results_dir: Annotated[str, Field(min_length=1)]
    force: Flag
    claim: ClaimConfig
    criteria: Annotated[dict[str, Criterion], Field(min_length=1)]
    grid: Grid
    data: DataConfig
    model: ModelConfig
    training: TrainingConfig
    scale: ScaleConfig
    tracker: TrackerConfig
    model_keys: list[str] = Field(default_factory=list)  # of `model`, those that the experiment leaves open
    cluster: ClusterConfig | None = None  # None: the runs go one after the other in this process
    detach: Flag = False  # leave the jobs of a sweep behind and return
    snapshot: Flag = False  # run the jobs of a sweep from a copy of the code


def _at_scale(by_scale: Mapping[str, Any], *, _root_: DictConfig) -> Any:
    """Resolve `${at_scale:{smoke:…,quick:…,paper:…}}` to the value at the run's scale."""
    missing, extra = set(get_args(ScaleName)) - set(by_scale), set(by_scale) - set(get_args(ScaleName))
    if missing or extra:
        raise UserError(f"at_scale needs exactly the scales {', '.join(get_args(ScaleName))}; got {', '.join(map(str, by_scale))}")
    scale = _root_.scale.name
    if scale not in by_scale:
        raise UserError(f"scale.name: {scale!r} is none of {', '.join(by_scale)}; choose with scale=NAME")
    return by_scale[scale]


def _times(each: Any, at_once: int | None) -> Any:
    """Resolve `${times:EACH,AT_ONCE}` to what a job is given for its runs at once; what is no number, or not said, stays so."""
    return each * (at_once or 1) if isinstance(each, int | float) else each


def register_resolvers() -> None:
    """Make `at_scale` and `times` known to OmegaConf."""
    OmegaConf.register_new_resolver("at_scale", _at_scale, replace=True)
    OmegaConf.register_new_resolver("times", _times, replace=True)


def to_config(composed: DictConfig) -> Config:
    """Check a composed Hydra config against the schema.

    Raises: UserError, naming every key that is unknown, of the wrong type or out of range.
    """
    try:
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        message = str(error).splitlines()[0].removeprefix("UserError raised while resolving interpolation: ")
        raise UserError(f"{error.full_key or 'config'}: {message}") from error
    try:
        return TypeAdapter(Config).validate_python(plain)
    except ValidationError as error:
        raise UserError("; ".join(_explain(dict(e)) for e in error.errors())) from error


def changed(settings: Settings, changes: Mapping[str, Any], where: str) -> Settings:
    """A model or training with some of its keys changed.

    Raises: UserError, naming where the changes stand and every key that is unknown, of the wrong type or out of range.
    """
    try:
        return replace(settings, **changes)
    except ValidationError as error:
        raise UserError("; ".join(f"{where}: {_explain(dict(e))}" for e in error.errors())) from error


def _explain(error: dict[str, Any]) -> str:
    """One validation error in one line: the key, what was wrong, what was given."""
    where = ".".join(str(part) for part in error["loc"] if not str(part).startswith(("list[", "function-")))
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return unknown_key(where)
    if error["type"] == "missing":
        return f"{where}: missing"
    message = error["msg"].removeprefix("Value error, ")
    given = "" if isinstance(error["input"], dict) or is_dataclass(error["input"]) else f" (got {error['input']!r})"
    return f"{where}: {message}{given}"


def require(condition: bool, rule: str) -> None:
    """Raise UserError with the rule, "KEY: what it must be", where the condition does not hold."""
    if not condition:
        raise UserError(rule)


def unknown_key(key: str) -> str:
    """Say that a key is unknown, with the nearest that is known."""
    near = difflib.get_close_matches(key, ["experiment", "cluster", *known_keys()], n=1, cutoff=0.6)
    return f"unknown key '{key}'" + (f"; did you mean '{near[0]}'?" if near else "")


def known_keys(schema: type = Config, prefix: str = "") -> Iterator[str]:
    """Yield every key of the schema, dotted."""
    hints = get_type_hints(schema)
    for entry in fields(schema):
        yield prefix + entry.name
        if is_dataclass(hints[entry.name]):
            yield from known_keys(cast(type, hints[entry.name]), prefix + entry.name + ".")
