"""The CUDA driver as the TensorRT worker and sessions use it, against a fake one."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from nmcompile.backends.tensorrt import cuda_driver


@pytest.fixture
def cuda(driver: str) -> Iterator[cuda_driver.Cuda]:
    with closing(cuda_driver.Cuda(driver)) as device:
        yield device


def test_copies_there_and_back(cuda: cuda_driver.Cuda, driver: str) -> None:
    stream, pointer = cuda.stream(), cuda.alloc(8)
    cuda.to_device(pointer, b"abcdefgh", 8, stream)
    back = ctypes.create_string_buffer(8)
    cuda.to_host(ctypes.addressof(back), pointer, 8, stream)
    assert back.raw == bytes(8), "the copy is made in the stream's order"
    cuda.synchronize(stream)
    assert back.raw == b"abcdefgh"
    words = (ctypes.c_uint32 * 2)(1, 2)
    for source in (ctypes.addressof(words), memoryview(words)):
        cuda.zero(pointer, 8)
        cuda.to_device(pointer, source, 8, stream)
        cuda.to_host(ctypes.addressof(back), pointer, 8, stream)
        cuda.synchronize(stream)
        assert back.raw == struct.pack("<2I", 1, 2)
    cuda.free(pointer)
    start, end = cuda.event(), cuda.event()
    cuda.record(start, stream)
    ctypes.CDLL(driver).fakeAdvance(ctypes.c_double(2.5))
    cuda.record(end, stream)
    assert cuda.elapsed_ms(start, end) == 2.5
    assert cuda.alloc(0) != 0


def test_closing_gives_everything_back(driver: str) -> None:
    device = cuda_driver.Cuda(driver)
    device.alloc(10), device.stream(), device.event()
    device.close()
    device.close()
    assert ctypes.CDLL(driver).fakeLeft() == 0


def test_each_thread_activates_the_context(cuda: cuda_driver.Cuda) -> None:
    said: list[str] = []

    def use() -> None:
        try:
            cuda.alloc(1)
        except cuda_driver.Failure as error:
            said.append(str(error))
        cuda.activate()
        cuda.alloc(1)
        said.append("fine")

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert "CUDA_ERROR_INVALID_CONTEXT" in said[0] and "activate()" in said[0] and said[1] == "fine"


def test_drivers_that_have_no_gpu(driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(cuda_driver.Failure, match="no GPU 3: the driver shows 1"):
        cuda_driver.Cuda(driver, device=3)
    monkeypatch.setenv("FAKE_CUDA_FAIL", "cuInit=803")
    with pytest.raises(cuda_driver.Failure, match="cuInit failed with CUDA error 803; install the driver") as caught:
        cuda_driver.Cuda(driver)
    assert caught.value.kind == "no-gpu"
    with pytest.raises(cuda_driver.Failure, match=r"no CUDA driver.*nowhere\.so"):
        cuda_driver.Cuda("nowhere.so")
