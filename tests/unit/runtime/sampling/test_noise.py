import numpy as np

from stiv_deploy.runtime.sampling.noise import draw_noise


def test_noise_is_philox_of_the_samples_own_seed() -> None:
    noise = draw_noise([7, 8], (2, 3))
    single = np.random.Generator(np.random.Philox(8)).standard_normal((2, 3), dtype=np.float32)
    np.testing.assert_array_equal(noise[1], single)
