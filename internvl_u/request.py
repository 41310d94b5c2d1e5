"""What is to be drawn, as a value."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from .chat import History
from .defaults import GUIDANCE, GUIDANCE_WITH_THOUGHT, LONGEST_SCHEDULE, STEPS, Guidance
from .numbers import check_real, check_whole
from .speed import QUALITY, GuidanceIntervals, Interval, Speed, check_speed
from .tokenizer import has_thought


@dataclass(frozen=True)
class ImageRequest:
    """What to draw. Sizes are pixels, scales the two guidance strengths; None takes the official default.

    With `images` (RGB) the prompt edits them; `thought` is a chain of thought that the drawing follows.
    `negative_prompt` is what to keep away from, which is not official; `reference_size` the most that the transformer
    sees of each image, as the side in pixels of a square of equal area, None for the official size. `history` is the
    conversation before, as far as it fits.

    Outside start..end, shares of the schedule in 0..1, a scale is 1 and costs less. `speed` is a preset of
    `speed.SPEEDS`: it sets steps and intervals where they are left as they are. `evaluations` is what `turbo` draws in,
    which `Pipeline.settled` finds out.
    """

    prompt: str
    width: int | None = None
    height: int | None = None
    steps: int = STEPS
    seed: int = 0
    all_cfg: float | None = None
    part_cfg: float | None = None
    system: str | None = None
    images: tuple[Image.Image, ...] = ()
    thought: str = ""
    negative_prompt: str = ""
    reference_size: int | None = None
    history: History = History()
    all_cfg_start: float = 0.0
    all_cfg_end: float = 1.0
    part_cfg_start: float = 0.0
    part_cfg_end: float = 1.0
    speed: str = QUALITY
    evaluations: int | None = None

    def __post_init__(self):
        check_whole("seed", self.seed, -(2**63), 2**64 - 1)
        check_whole("steps", self.steps, 1, LONGEST_SCHEDULE)
        for name in ("all_cfg", "part_cfg"):
            if getattr(self, name) is not None:
                check_real(name, getattr(self, name))
        self._typed.intervals.check()
        check_speed(self.speed)

    @property
    def way(self) -> Speed:
        """The steps and the intervals of guidance, those of the preset where none are given.

        Raises:
            ValueError: the preset is `turbo`, and nobody has said in how many evaluations.
        """
        return self._typed.filled(self.speed, self.evaluations)

    @property
    def _typed(self) -> Speed:
        words, pictures = (self.all_cfg_start, self.all_cfg_end), (self.part_cfg_start, self.part_cfg_end)
        return Speed(self.steps, GuidanceIntervals(Interval(*words), Interval(*pictures)))

    @property
    def guidance(self) -> Guidance:
        """The two guidance strengths: the official ones, which a thought changes, where none is given."""
        usual = GUIDANCE_WITH_THOUGHT if has_thought(self.thought) else GUIDANCE
        return Guidance(
            usual.all_cfg if self.all_cfg is None else self.all_cfg,
            usual.part_cfg if self.part_cfg is None else self.part_cfg,
        )
