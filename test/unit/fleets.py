"""Members that say what a test has them say, and a clock that only the test moves."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
from sglang_memserve.protocol import PROTOCOL_VERSION
from sglang_memserve.protocol.handshake import layout_hash
from sglang_memserve.protocol.http import Heartbeat, InstanceInfo, Load, RankInfo
from sglang_memserve.router.members.instances import Instances
from sglang_memserve.router.members.member import MemberStatus
from sglang_memserve.types import Generation, InstanceId, Namespace

A, B = InstanceId("http://a:1"), InstanceId("http://b:1")
NAMESPACE = Namespace("model", "1", "bfloat16", 16, 30, 3, 64, 64, 0, 1)
WIDER = Namespace("model", "1", "bfloat16", 32, 30, 3, 64, 64, 0, 1)
SPLIT = Namespace("model", "1", "bfloat16", 16, 30, 3, 64, 64, 0, 2)
LOAD = Load(running_requests=2, waiting_requests=1, used_tokens=30, total_tokens=100)


def info(url: str = A, generation: str = "g1", **changes: object) -> InstanceInfo:
    namespace = changes.pop("namespace", NAMESPACE)
    assert isinstance(namespace, Namespace)
    plain = InstanceInfo(
        protocol=PROTOCOL_VERSION,
        url=url,
        generation=generation,
        role="both",
        model_path="/models/model",
        served_model_name="model",
        layout_hash=layout_hash(namespace),
        namespace=namespace,
        page_size=namespace.page_size,
        context_length=8192,
        max_total_tokens=20000,
        events_address="tcp://127.0.0.1:2",
        ranks=[RankInfo(0, "tcp://127.0.0.1:1", "tcp://127.0.0.1:2", 100, namespace.block_bytes)],
    )
    return msgspec.structs.replace(plain, **changes)


@dataclass
class Recorder:
    told: list[str] = field(default_factory=list)

    def joined(self, info: InstanceInfo) -> None:
        self.told.append(f"joined {info.url} {info.generation}")

    def left(self, instance: InstanceId) -> None:
        self.told.append(f"left {instance}")

    def beat(self, instance: InstanceId, generation: Generation, event_seq: int) -> None:
        self.told.append(f"beat {instance} {event_seq}")


class Fleet:
    def __init__(self) -> None:
        self.now = 0.0
        self.recorder = Recorder()
        self.instances = Instances(
            lambda: self.now, [self.recorder], heartbeat_s=2.0, expire_s=10.0
        )

    def member(self, instance: InstanceId = A) -> MemberStatus:
        self.instances.check()
        return next(m for m in self.instances.members() if m.id == instance)

    def beat(self, instance: InstanceId = A, generation: str = "g1", role: str = "both") -> bool:
        beat = Heartbeat(instance, generation, role, LOAD, event_seq=7)
        return self.instances.heartbeat(beat).known

    def usable(self) -> list[InstanceId]:
        self.instances.check()
        return [view.id for view in self.instances.views({})]
