"""The parts a trainer is put together from."""
