"""Who holds which layer: `Placement`, the one dial set of DESIGN section 3, of which the paper is one point.

A placement comes from a name or a text (`Placement.parse`), is checked against a model's depth, travels in the OPEN
message, and tells both ends which layers they run and at which of them they exchange activations.
"""

from __future__ import annotations

from dataclasses import dataclass

from privatelora.protocol.errors import ConfigurationError

NAMES = ("paper", "few-trips", "one-trip")

FEW_TRIPS_LAST = 8  # DESIGN section 3: last 8 held by the device and four spread inline layers, 99% of LoRA's gain
FEW_TRIPS_INLINE = 4
ONE_TRIP_ENDS = 2


@dataclass(frozen=True)
class Placement:
    """Which decoder layers the device holds, and which of the service's are adapted inline.

    Parameters
    ----------
    first : layers [0, first) run on the device.
    last : layers [L - last, L) run on the device.
    inline : layers of the service that are adapted by the device's M, one exchange each, ascending.
    train_first : whether the device's first layers carry LoRA; without it they only run.
    """

    first: int = 0
    last: int = 0
    inline: tuple[int, ...] = ()
    train_first: bool = True

    @classmethod
    def named(cls, name: str, num_layers: int) -> Placement:
        """Return the placement called `name` for a model of `num_layers` layers (see `NAMES`)."""
        if name == "paper":
            placement = cls(inline=tuple(range(num_layers)))
        elif name == "few-trips":
            last = min(FEW_TRIPS_LAST, num_layers // 2)
            cloud = num_layers - last
            step = max(1, cloud // FEW_TRIPS_INLINE)
            placement = cls(last=last, inline=tuple(range(step // 2, cloud, step))[:FEW_TRIPS_INLINE])
        elif name == "one-trip":
            placement = cls(first=ONE_TRIP_ENDS, last=ONE_TRIP_ENDS)
        else:
            raise ConfigurationError(f"placement {name!r} is unknown; use one of {', '.join(NAMES)}, or first=2,last=4")
        return placement.check(num_layers)

    @classmethod
    def parse(cls, text: str, num_layers: int) -> Placement:
        """Read a name, or settings such as `first=2,last=4,inline=7+12,train_first=no` (`inline=all`: every layer)."""
        if "=" not in text:
            return cls.named(text.strip(), num_layers)
        values: dict[str, str] = {}
        for item in text.split(","):
            key, _, value = item.partition("=")
            values[key.strip()] = value.strip()
        unknown = set(values) - {"first", "last", "inline", "train_first"}
        if unknown:
            raise ConfigurationError(
                f"placement {text!r} names {', '.join(sorted(unknown))}; known are first, last, inline and train_first"
            )
        try:
            first, last = int(values.get("first", "0")), int(values.get("last", "0"))
            wanted = values.get("inline", "")
            if wanted == "all":
                inline = tuple(range(first, num_layers - last))
            else:
                inline = tuple(int(layer) for layer in wanted.split("+") if layer)
            train_first = {"yes": True, "true": True, "no": False, "false": False}[values.get("train_first", "yes")]
        except (ValueError, KeyError) as error:
            raise ConfigurationError(
                f"placement {text!r} cannot be read ({error}); write it as first=2,last=4,inline=7+12,train_first=no"
            ) from None
        return cls(first, last, inline, train_first).check(num_layers)

    def check(self, num_layers: int) -> Placement:
        """Return self if it fits a model of `num_layers` layers, else raise `ConfigurationError`."""
        if min(self.first, self.last) < 0 or self.first + self.last >= num_layers:
            raise ConfigurationError(
                f"a device that holds the first {self.first} and last {self.last} layers leaves the service none of "
                f"{num_layers}; the two must be 0 or more and add up to less than {num_layers}"
            )
        cloud = self.cloud_layers(num_layers)
        if list(self.inline) != sorted(set(self.inline)) or any(layer not in cloud for layer in self.inline):
            raise ConfigurationError(
                f"inline layers {list(self.inline)} must be ascending, without repeats and among the service's layers "
                f"{cloud.start}..{cloud.stop - 1}"
            )
        return self

    def cloud_layers(self, num_layers: int) -> range:
        """Layers that the service runs."""
        return range(self.first, num_layers - self.last)

    def trained_layers(self, num_layers: int) -> tuple[int, ...]:
        """Device-held layers that carry LoRA."""
        return (*range(self.first if self.train_first else 0), *range(num_layers - self.last, num_layers))

    @property
    def trains_first(self) -> bool:
        """Whether a gradient must come back to the device's first layers."""
        return self.train_first and self.first > 0

    @property
    def sends_gradient(self) -> bool:
        """Whether training sends any gradient: only if something below the last layers is trained."""
        return bool(self.inline) or self.trains_first

    @property
    def round_trips(self) -> int:
        """Dependent round trips that one token costs."""
        return len(self.inline) + 1

    def describe(self, num_layers: int) -> str:
        """The placement's name if it has one, else the text that `parse` reads."""
        for name in NAMES:
            try:
                if Placement.named(name, num_layers) == self:
                    return name
            except ConfigurationError:  # a model too shallow for this name
                continue
        every = self.inline and self.inline == tuple(self.cloud_layers(num_layers))
        inline = "all" if every else "+".join(map(str, self.inline))
        text = f"first={self.first},last={self.last}" + (f",inline={inline}" if inline else "")
        return text if self.train_first else text + ",train_first=no"
