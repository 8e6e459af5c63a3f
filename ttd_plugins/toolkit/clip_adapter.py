"""Base class of adapters for published CLIP models: their options, the description, and the checks around features."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, get_args

from torch import Tensor, nn

from ttd_plugins.adapter import BackboneDescription, Calibration, DenseAdapter, ImageFeatures, Tower
from ttd_plugins.errors import InputError, UnsupportedModelError, choices_sentence
from ttd_plugins.options import Resampling
from ttd_plugins.toolkit.dense_modes import PRESETS
from ttd_plugins.toolkit.tokenizing import inner_tokenizer
from ttd_plugins.toolkit.transforms import Normalisation


class CLIPAdapter(DenseAdapter):
    """A CLIP model behind the contract; subclasses say where a library stores the parts.

    Subclasses run the blocks of the image tower themselves and pass a mask to the last one as an argument. So
    activation checkpointing works, and nothing is left behind in the model. Patch dropout is never applied, because a
    dropped patch has no position in the map.

    Attributes:
        family: name of the adapter family.
        modes: the dense modes by name; each has a ``name``.
        default_mode: name of the mode that is used where the caller chooses none.
        tower_prefixes: prefixes of the names of each tower's parameters.
        calibrated, trained_on: see :class:`~ttd_plugins.adapter.BackboneDescription`; a calibration that the caller
            passes is taken as fitted.
    """

    model: Any
    family: ClassVar[str]
    modes: ClassVar[Mapping[str, Any]] = PRESETS
    default_mode: ClassVar[str] = "maskclip"
    tower_prefixes: ClassVar[Mapping[Tower, tuple[str, ...]]] = {}
    trained_on: str | None = None
    resamplings: tuple[Resampling, ...] = get_args(Resampling)

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: Any = None,
        preprocess: Any = None,
        dense: Any = None,
        calibration: Calibration | None = None,
        positions: Resampling = "library",
        name: str | None = None,
        weights: str | None = None,
    ) -> None:
        """Adapt ``model`` without changing it.

        Args:
            model: the model; the class docstring says which.
            tokenizer: the model's tokenizer; ``None`` if no texts are tokenised.
            preprocess: the model's evaluation preprocessing, or a mapping with ``mean`` and ``std``; by default what
                the model says itself, or else what its family was trained with.
            dense: the dense mode: a name of :attr:`modes` or a mode object; :attr:`default_mode` by default.
            calibration: map from cosine to probability; the family's default where none is given.
            positions: how position embeddings are resampled at other image sizes, see :attr:`resamplings`.
            name, weights: names for the description.

        Raises:
            UnsupportedModelError: a part of the model is not supported, with the reason.
            InputError: an option is unknown.
        """
        reason = self._unsupported_reason(model)
        if reason is not None:
            raise UnsupportedModelError(f"this {type(model).__name__} cannot be adapted: {reason}")
        super().__init__(model)
        self.tokenizer = inner_tokenizer(tokenizer)
        self._preprocess = None if isinstance(preprocess, Mapping) else preprocess
        self._normalisation = self._read_normalisation(preprocess)
        self._calibration = calibration if calibration is not None else self._default_calibration()
        self.calibrated = calibration is not None and calibration != Calibration()
        self._name = name if name is not None else type(model).__name__
        self._weights = weights
        self.dense = self.default_mode if dense is None else dense
        self.positions = positions
        image_width, text_width = self._embedding_widths()
        if text_width is not None and image_width != text_width:
            raise UnsupportedModelError(
                f"this {type(model).__name__} cannot be adapted: image embeddings have width {image_width} and text "
                f"embeddings {text_width}, so they share no space"
            )

    # What a subclass says of its library's models ------------------------------------------------------------------

    @abstractmethod
    def _unsupported_reason(self, model: nn.Module) -> str | None:
        """Why ``model`` cannot be adapted, as the end of a sentence; ``None`` where it can."""

    @abstractmethod
    def _read_normalisation(self, preprocess: Any) -> Normalisation:
        """How pixels are normalised, by the caller's ``preprocess`` or else by the model."""

    @abstractmethod
    def _embedding_widths(self) -> tuple[int, int | None]:
        """Width of image embeddings, and of text embeddings where the text tower states it."""

    @property
    @abstractmethod
    def _patch_size(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""

    @property
    @abstractmethod
    def _grid(self) -> tuple[int, int]:
        """Rows and columns of the patch grid that the model was trained with."""

    @property
    @abstractmethod
    def _context_length(self) -> int:
        """Positions of the text tower."""

    @property
    @abstractmethod
    def _text_needs_full_context(self) -> bool:
        """Whether positions after the end token can change a text embedding."""

    @abstractmethod
    def _encode_image(self, pixels: Tensor, grid: tuple[int, int], pooled: bool) -> ImageFeatures:
        """Features of pixels whose size fits ``grid``."""

    def _unsupported_mode_reason(self, mode: Any) -> str | None:
        """Why the model cannot use a dense mode now, as the end of a sentence; ``None`` where it can."""
        return None

    def _default_calibration(self) -> Calibration:
        """Map from cosine to probability where the caller passes none."""
        return Calibration()

    # The contract --------------------------------------------------------------------------------------------------

    @property
    def dense(self) -> Any:
        """The dense mode; assign a name of :attr:`modes` or a mode object to change it."""
        return self._mode

    @dense.setter
    def dense(self, value: Any) -> None:
        if isinstance(value, str):
            if value not in self.modes:
                raise InputError(choices_sentence("dense mode", value, self.modes))
            value = self.modes[value]
        self._require_mode(value)
        self._mode = value

    @property  # type: ignore[override]
    def positions(self) -> Resampling:
        """How position embeddings are resampled; assign one of :attr:`resamplings` to change it."""
        return self._resampling

    @positions.setter
    def positions(self, value: Resampling) -> None:
        if value not in get_args(Resampling):
            raise InputError(choices_sentence("resampling of positions", str(value), get_args(Resampling)))
        if value not in self.resamplings:
            raise UnsupportedModelError(
                f"positions={value!r} cannot be used: the image tower of {self._name} has no position embeddings that "
                "could be resampled; leave the option out"
            )
        self._resampling = value

    def _usable_modes(self) -> tuple[str, ...]:
        return tuple(name for name, mode in self.modes.items() if self._unsupported_mode_reason(mode) is None)

    def _require_mode(self, mode: Any) -> None:
        """Raise UnsupportedModelError if the model cannot use a dense mode."""
        reason = self._unsupported_mode_reason(mode)
        if reason is not None:
            usable = self._usable_modes()
            advice = f"; use one of: {', '.join(usable)}" if usable else ""
            raise UnsupportedModelError(f"dense mode {mode.name!r} cannot be used: {reason}{advice}")

    @property
    def description(self) -> BackboneDescription:
        """What this backbone is."""
        (rows, columns), (height, width) = self._grid, self._patch_size
        return BackboneDescription(
            family=self.family,
            model=self._name,
            weights=self._weights,
            embedding_width=self._embedding_widths()[0],
            patch_size=(height, width),
            image_size=(rows * height, columns * width),
            mean=self._normalisation.mean,
            std=self._normalisation.std,
            interpolation=self._normalisation.interpolation,
            context_length=self._context_length,
            text_needs_full_context=self._text_needs_full_context,
            logits="softmax" if self.logit_bias() is None else "sigmoid",
            dense_mode=self.dense.name,
            dense_modes=self._usable_modes(),
            calibration=self._calibration,
            calibrated=self.calibrated,
            trained_on=self.trained_on,
            positions=self.positions,
        )

    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        """Patch features in the joint space, and the library's pooled embedding, from one pass.

        Towers that average their patches need the patches of the last block twice where the pooled embedding is wanted:
        as trained, and by the dense mode. The two share what they can.

        Args:
            pixels: float ``[B, 3, height, width]``, normalised; cast to the dtype of the model.
            pooled: whether the pooled embedding is wanted too.

        Returns:
            Features that are not L2-normalised, in the dtype of the model.

        Raises:
            ImageSizeError: the size does not fit the patch grid.
            UnsupportedModelError: a module was wrapped so that the dense mode is no longer sound.
        """
        grid = self.pixel_grid(pixels)
        self._require_mode(self.dense)
        return self._encode_image(pixels, grid, pooled)

    def logit_bias(self) -> Tensor | None:
        """The bias of the logits of a model trained with a sigmoid loss, a scalar tensor, or ``None``."""
        bias: Any = getattr(self.model, "logit_bias", None)
        return None if bias is None else bias.reshape(())

    def tower_parameters(self, tower: Tower) -> Iterable[tuple[str, nn.Parameter]]:
        """Named parameters of one tower; logit scale and bias belong to neither.

        Raises:
            UnsupportedModelError: no parameter of the model has a name of the tower.
        """
        named = list(self.model.named_parameters())
        own = [(name, parameter) for name, parameter in named if name.startswith(self.tower_prefixes[tower])]
        if not own:
            first = f"; its parameters have names such as {named[0][0]}" if named else ""
            raise UnsupportedModelError(
                f"this {type(self.model).__name__} has no parameters of the {tower} tower, whose names begin with "
                f"{' or '.join(self.tower_prefixes[tower])}{first}; pass the model itself and not a wrapper around it"
            )
        return own
