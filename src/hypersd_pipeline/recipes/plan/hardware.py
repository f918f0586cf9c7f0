"""GPUs, and how a plan for them is asked for."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from hypersd_pipeline.config import Count, Share, Strict

GIB = 2**30


class Hardware(Strict):
    """A kind of GPU.

    Attributes:
        memory_gib: of one. bf16_tflops, fp32_tflops: its peaks, dense.
        dollars_an_hour: of one. sources: where these numbers are from.
    """

    memory_gib: float = Field(gt=0, le=10_000)
    bf16_tflops: float = Field(gt=0, le=10**6)
    fp32_tflops: float = Field(gt=0, le=10**6)
    dollars_an_hour: float = Field(ge=0, le=10**6)
    sources: tuple[str, ...] = Field(min_length=1)


class PlanConfig(Strict):
    """What is planned for.

    Attributes:
        profile: one of ``profiles``. gpus: how many of them, each with a process.
        profiles: kinds of GPUs by name.
        images: of the data set, for the size of the caches.
        utilisation: share of the peak that a training reaches. It is an assumption until you have measured your own.
        reserved_gib: of each GPU, for CUDA itself and its libraries. fragmentation: share of the memory that the allocator cannot use.
        checkpoints: of a stage, on the disk at a time.
        refuse: end with an error where a stage does not fit.
    """

    profile: str
    profiles: dict[str, Hardware]
    gpus: Count = 1
    images: Count
    utilisation: Share = 0.33
    reserved_gib: float = Field(default=1.0, ge=0, le=100)
    fragmentation: Share = 0.05
    checkpoints: Count = 2
    refuse: bool = True

    @field_validator("profile", mode="before")
    @classmethod
    def _named(cls, profile: object) -> object:
        return str(profile) if isinstance(profile, int) else profile

    @model_validator(mode="after")
    def _known(self) -> PlanConfig:
        if self.profile not in self.profiles:
            raise ValueError(f"profile is {self.profile}, and profiles has {', '.join(self.profiles)}; name one of them or add it")
        if not self.utilisation:
            raise ValueError("utilisation is 0, with which no training ends; give a share above 0")
        return self

    @property
    def hardware(self) -> Hardware:
        """The chosen kind of GPU."""
        return self.profiles[self.profile]

    @property
    def usable(self) -> float:
        """Bytes of one GPU that a training can fill."""
        return (self.hardware.memory_gib - self.reserved_gib) * (1 - self.fragmentation) * GIB
