"""Who writes and who verifies, as flags name them, with the settings that they bring along."""

import dataclasses
from collections.abc import Sequence

from mathv2_jax.cli import engines, search_config
from mathv2_jax.rollout import remote
from mathv2_jax.stages import run as run_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Players:
    """Checkpoints are found, servers have their settings, and nothing is loaded."""

    writer: engines.Spec
    verifier: engines.Spec
    found: dict[engines.Spec, engines.Found]
    servers: dict[engines.Spec, remote.RemoteConfig]
    config: search_config.SearchConfig

    @classmethod
    def of(
        cls,
        writer: engines.Spec,
        verifier: engines.Spec,
        overrides: Sequence[tuple[str, str]],
    ) -> "Players":
        """ValueError or FileNotFoundError where an engine is missing or a setting at fault."""
        found = {
            spec: engines.locate(spec)
            for spec in (writer, verifier)
            if spec.kind == engines.CHECKPOINT
        }
        config = search_config.build(overrides, found.get(writer), found.get(verifier))
        servers = {
            spec: engines.server_config(spec, {"think": config.roles.think, **settings}, where)
            for spec, settings, where in (
                (verifier, config.verifier_remote, "verifier_remote"),
                (writer, config.remote, "remote"),  # this one's, where they are the same
            )
            if spec.kind == engines.SERVER
        }
        return cls(writer=writer, verifier=verifier, found=found, servers=servers, config=config)

    @property
    def names(self) -> dict[str, str]:
        """The models by what they do, wherever they stand: a checkpoint by its variables."""
        both = {"generator": self.writer, "verifier": self.verifier}
        return {
            role: f"{spec.kind}:{self.found[spec].print if spec in self.found else spec.part}"
            for role, spec in both.items()
        }

    def open(self) -> dict[engines.Spec, engines.Opened]:
        """The engines, loaded."""
        config, opened = self.config, dict[engines.Spec, engines.Opened]()
        runtime = run_lib.RuntimeConfig(
            mesh=config.runtime.mesh,
            model_kernels=config.runtime.model_kernels,
            attention=config.runtime.attention,
        )
        pairs = ((self.writer, config.engine), (self.verifier, config.verifier_engine))
        for spec, engine in pairs:
            if spec in opened:
                continue
            if spec.kind == engines.SERVER:
                opened[spec] = engines.open_server(self.servers[spec])
            else:
                think = config.roles.think
                opened[spec] = engines.open_checkpoint(
                    self.found[spec], engine, runtime, think=think
                )
        return opened
