"""Page accounting at its edges."""

from __future__ import annotations

import pytest

from ziphius.config.errors import BadInput
from ziphius.inference.pages import PagePool, PageTable


def filled(pool: PagePool, tokens: list[int], salt: bytes = b"") -> PageTable:
    """Return a table whose rows are all computed and published."""
    table = PageTable(pool, salt)
    assert table.begin(tokens) is not None
    table.publish(tokens, len(tokens))
    return table


def test_a_prompt_is_never_found_whole() -> None:
    """Its last token is computed for its logits, also where the prompt ends with a page."""
    pool = PagePool(8, 4)
    filled(pool, list(range(8))).release()
    for length, start in ((4, 0), (5, 4), (7, 4), (8, 4), (9, 8)):
        table = PageTable(pool)
        assert table.begin(list(range(length))) == start
        assert table.slots(start, length)[0] >= 0
        table.release()


def test_recomputed_tokens_have_no_slot() -> None:
    pool = PagePool(8, 4)
    filled(pool, list(range(9))).release()
    table = PageTable(pool)
    assert table.begin(list(range(11)), recompute=1) == 7
    first = table.pages[2] * 4
    assert table.slots(7, 11) == [-1, first, first + 1, first + 2]
    table.release()
    assert table.begin(list(range(4)), recompute=1) == 0  # nothing found, nothing again


def test_a_limit_cuts_the_found_prefix() -> None:
    pool = PagePool(8, 2)
    filled(pool, list(range(8))).release()
    for limit, start in ((0, 0), (1, 0), (2, 2), (5, 4), (99, 6)):
        table = PageTable(pool)
        assert table.begin(list(range(8)), limit=limit) == start
        table.release()


def test_other_salts_do_not_share() -> None:
    pool = PagePool(8, 2)
    filled(pool, [1, 2, 3, 4], b"a").release()
    for salt, start in ((b"", 0), (b"b", 0), (b"a", 2)):
        table = PageTable(pool, salt)
        assert table.begin([1, 2, 3, 4], spare=0) == start
        table.release()


def test_a_salt_that_imitates_a_page_does_not_share() -> None:
    """The key of a page is that of other bytes than any salt's."""
    pool = PagePool(8, 1)
    owner = filled(pool, [1, 2, 3])
    spy = PageTable(pool, owner._keys[0] + (1).to_bytes(8, "little"))
    assert spy.begin([2, 3, 4]) == 0


def test_only_equal_tokens_from_the_start_on_are_shared() -> None:
    pool = PagePool(8, 2)
    filled(pool, [1, 2, 3, 4, 5]).release()
    for tokens, start in (([1, 2, 3, 4, 9], 4), ([1, 2, 9, 4, 5], 2), ([3, 4, 5], 0)):
        table = PageTable(pool)
        assert table.begin(tokens) == start
        table.release()


def test_rows_that_are_not_computed_are_not_found() -> None:
    pool = PagePool(8, 2)
    table = PageTable(pool)
    table.begin([1, 2, 3, 4, 5])
    table.publish([1, 2, 3, 4, 5], 3)
    assert PageTable(pool).begin([1, 2, 3, 4, 5]) == 2


def test_equal_pages_are_merged_and_the_second_is_given_back() -> None:
    pool = PagePool(8, 2)
    tokens = [1, 2, 3, 4, 5]
    first, second = PageTable(pool), PageTable(pool)
    first.begin(tokens), second.begin(tokens)
    assert pool.used == 6
    first.publish(tokens, 5), second.publish(tokens, 5)
    assert second.pages[:2] == first.pages[:2]
    assert second.pages[2] != first.pages[2]
    assert pool.used == 4
    pool.check([first, second])


def test_children_are_taken_before_parents_and_the_least_recent_first() -> None:
    pool = PagePool(6, 1)
    for tokens, pages in (([1, 2, 3], [0, 1, 2]), ([4, 5, 6], [3, 4, 5])):
        table = filled(pool, tokens)
        assert table.pages == pages
        table.release()
    # Page 0 is used again, its children are not; page 2 is taken for the 9 and given back blank.
    table = PageTable(pool)
    assert table.begin([1, 9]) == 1
    assert table.pages == [0, 2]
    table.release()
    assert [pool.take(1) for _ in range(6)] == [[2], [1], [5], [4], [3], [0]]


def test_a_fork_shares_full_pages_and_copies_the_last() -> None:
    pool = PagePool(8, 4)
    parent = filled(pool, list(range(10)))
    child, copies = parent.fork(10)
    assert child.pages[:2] == parent.pages[:2]
    assert copies == [(parent.pages[2], child.pages[2])]
    assert child.slots(9, 10) == [-1]
    assert child.slots(10, 12) == [child.pages[2] * 4 + 2, child.pages[2] * 4 + 3]
    parent.release()
    assert pool.used == 3
    pool.check([child])
    whole, none = child.fork(8)
    assert (whole.pages, none) == (child.pages[:2], [])


def test_a_fork_without_room_changes_nothing() -> None:
    pool = PagePool(2, 4)
    parent = filled(pool, list(range(6)))
    assert parent.fork(6) is None
    pool.check([parent])
    child, _ = parent.fork(4)
    pool.check([parent, child])


def test_one_page() -> None:
    pool = PagePool(1, 1)
    table = PageTable(pool)
    assert table.begin([5]) == 0
    assert not table.extend(2)
    assert PageTable(pool).begin([5]) is None
    table.publish([5], 1)
    table.release()
    table.release()
    assert (pool.free, pool.cached, pool.used) == (1, 1, 0)
    assert table.begin([6]) == 0
    assert (pool.free, pool.cached, pool.used) == (0, 0, 1)


def test_spare_pages_are_left() -> None:
    pool = PagePool(4, 2)
    assert PageTable(pool).begin([1, 2, 3], spare=3) is None
    assert PageTable(pool).begin([1, 2, 3], spare=2) == 0


def test_misuse_is_an_error_that_says_so() -> None:
    pool = PagePool(4, 2)
    (page,) = pool.take(1)
    for never in (page + 1, 4, -1):
        with pytest.raises(ValueError, match=f"page {never} was never taken from this pool of 4"):
            pool.release(never)
        with pytest.raises(ValueError, match="never taken"):
            pool.hold(never)
    pool.release(page)
    with pytest.raises(ValueError, match=f"page {page} is released twice"):
        pool.release(page)
    with pytest.raises(ValueError, match="given back and is blank"):
        pool.hold(page)
    table = PageTable(pool)
    table.begin([1, 2, 3])
    with pytest.raises(ValueError, match="the table has pages already"):
        table.begin([1, 2, 3])
    with pytest.raises(ValueError, match="can't fork 5 positions of 4"):
        table.fork(5)
    with pytest.raises(ValueError, match="can't fork 1 full pages: 0 are published"):
        table.fork(2)
    with pytest.raises(ValueError, match="page 1 isn't full: the sequence has 3 tokens"):
        table.publish([1, 2, 3], 4)
    with pytest.raises(ValueError, match="2 pages are held"):
        pool.forget()
    with pytest.raises(ValueError, match="can't trim to 1 positions"):
        table.trim(1)
    pool.check([table])
    for pages, size in ((0, 4), (4, 0), (-1, 4)):
        with pytest.raises(BadInput, match="holds nothing"):
            PagePool(pages, size)


@pytest.mark.parametrize(
    "broken",
    [
        "_blank.append(2)", "_cached.update({0: None})", "_holders.__setitem__(0, 0)",
        "_holders.__setitem__(0, 5)", "_keys.__setitem__(3, (b'', b''))", "_page_of.clear()",
        "_cached.popitem()", "_cached.move_to_end(3)",
    ],
)  # fmt: skip
def test_the_check_notices(broken: str) -> None:
    """Pages 0 and 1 are held and known, 3 and 2 cached and known, 4 was never taken."""
    pool = PagePool(5, 1)
    table = filled(pool, [1, 2])
    other = filled(pool, [3, 4])
    assert (table.pages, other.pages) == ([0, 1], [2, 3])
    other.release()
    pool.check([table])
    eval(f"pool.{broken}", {"pool": pool})
    with pytest.raises(AssertionError):
        pool.check([table])
