"""Ids are read from the system in bulk; none is given twice."""

from __future__ import annotations

from sglang_memserve.router.http.ids import ID_BYTES, IDS_A_READ, Ids, new_id


def test_one_read_serves_many_ids() -> None:
    reads: list[int] = []

    def random(size: int) -> bytes:
        reads.append(size)
        return b"".join((len(reads) * size + i).to_bytes(2, "big") for i in range(size // 2))

    ids = Ids(random)
    given = [ids() for _ in range(IDS_A_READ + 1)]
    assert reads == [ID_BYTES * IDS_A_READ] * 2
    assert len(set(given)) == len(given)


def test_an_id_is_32_hexadecimal_digits() -> None:
    given = [new_id() for _ in range(1000)]
    assert len(set(given)) == len(given)
    assert all(len(one) == 32 and int(one, 16) >= 0 for one in given)
