"""A process that measures rows of `benchmarks.device` on one backend."""

import contextlib
import multiprocessing
import os
import time
import traceback


class Worker:
    """A process of its own, in which Keras runs on a backend.

    It ends with the first row that fails, because what is left of such a row
    might be the failure of the next one.

    Args:
        backend: String, `"jax"` or `"torch"`.
    """

    def __init__(self, backend):
        self.environment = None
        # A forked process would share what this one has of the device.
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, backend))
        self.process.start()
        # So that the connection ends when the process does.
        other.close()

    def start(self, deadline):
        """Waits until it has started, for the first time that it is called.

        Args:
            deadline: Float, when to give it up, in the time of
                `time.monotonic`.

        Returns:
            Dict, the environment of the figures, or the `status` if it failed.
        """
        if self.environment is None:
            self.environment = self.receive(deadline)
        return self.environment

    def measure(self, deadline, **options):
        """Yields the figures of a row as they come, and last its `status`.

        Args:
            deadline: As in `start`.
            **options: What `benchmarks.figures.measure` takes.
        """
        answer = self.start(deadline)
        if "status" in answer:
            yield answer
            return
        # If it has ended, `receive` says how.
        with contextlib.suppress(OSError):
            self.connection.send(options)
        while "status" not in answer:
            answer = self.receive(deadline)
            yield answer

    def receive(self, deadline):
        """What the process says next, or that it is no more."""
        try:
            if self.connection.poll(max(deadline - time.monotonic(), 0)):
                return self.connection.recv()
        except (EOFError, OSError):
            self.process.join(10)
            code = self.process.exitcode
            return {"status": f"failed: the process ended with code {code}"}
        self.end()
        return {"status": "stopped"}

    def end(self):
        self.process.kill()
        self.process.join()


def serve(connection, backend):
    """Measures what comes by a connection, until a row fails."""
    os.environ["KERAS_BACKEND"] = backend
    # Else it would take most of the device's memory from the other backend.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    try:
        # Only here, where the backend is chosen.
        from benchmarks import figures

        connection.send(figures.environment())
        while True:
            for answer in figures.measure(**connection.recv()):
                connection.send(answer)
            connection.send({"status": "done"})
    except (EOFError, BrokenPipeError):
        # Nobody asks any more.
        pass
    except Exception as error:
        words = f"{type(error).__name__}: {error}".splitlines()[0]
        connection.send(
            {
                "status": f"failed: {words[:200]}",
                "traceback": traceback.format_exc(),
            }
        )
