"""Which values of ``model`` name what this router serves."""

from __future__ import annotations

from .instances import Instances

# SGLang's stand-in for a request that names no model (``openai.protocol.DEFAULT_MODEL_NAME``).
DEFAULT = "default"


class ModelNames:
    """All members serve one model: its served name, its path, and ``default`` name it.

    SGLang itself ignores the name; a router that may one day serve several must not. A LoRA
    adapter is asked for as ``base:adapter``, as in SGLang.
    """

    def __init__(self, instances: Instances) -> None:
        self._instances = instances

    def known(self, model: str) -> bool:
        """True as well while nobody has told us what is served here."""
        names = self.names()
        return not names or model in (DEFAULT, *names) or self.adapter(model) is not None

    def adapter(self, model: str) -> str | None:
        """The LoRA adapter asked for."""
        for name in (*self.names(), DEFAULT):
            if model == name:
                return None
        for name in (*self.names(), DEFAULT):
            if model.startswith(f"{name}:"):
                return model[len(name) + 1 :].strip() or None
        return None

    def names(self) -> tuple[str, ...]:
        reference = self._instances.reference()
        if reference is not None:
            return reference.served_model_name, reference.model_path
        plain = {member.model for member in self._instances.members() if member.model}
        return tuple(sorted(plain))
