import threading

import pytest

from keras_fvae.backend.scoped import ScopedValue


def test_the_value_holds_inside_the_block_alone():
    scoped = ScopedValue(default=1)
    with scoped.set_to(2):
        with pytest.raises(KeyError), scoped.set_to(3):
            assert scoped.value == 3
            raise KeyError
        assert scoped.value == 2
    assert scoped.value == 1


def test_other_threads_have_their_own():
    scoped = ScopedValue(default=1)
    seen = []

    def run():
        seen.append(scoped.value)
        with scoped.set_to(3):
            seen.append(scoped.value)

    with scoped.set_to(2):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert scoped.value == 2
    assert seen == [1, 3]
