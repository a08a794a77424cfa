from stiv_deploy.runtime.pipeline.recent import Recent


def test_the_last_asked_for_are_kept_and_the_oldest_goes_first() -> None:
    made: list[str] = []
    recent: Recent[str] = Recent(2)

    def get(key: str) -> str:
        def make() -> str:
            assert len(recent._things) < 2  # room is made before, never after
            made.append(key)
            return key * 2

        return recent.get(key, make)

    assert [get(key) for key in "abab"] == ["aa", "bb", "aa", "bb"]
    assert made == ["a", "b"]
    get("a")
    get("c")  # instead of b
    get("a")
    assert made == ["a", "b", "c"]
    recent.clear()
    get("a")
    assert made == ["a", "b", "c", "a"]
