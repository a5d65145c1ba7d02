"""A process that reads, tokenises, and packs a rank's stream beside training, which it would otherwise delay.

The rank starts ``python -m qsparse_moe.data.reader_process``, writes one line of JSON with what to read to its standard
input, and reads messages from its standard output: a line of JSON, followed by the bytes of the token ids if it has
any. The process waits while the rank has not read its last message, and ends when the rank has gone.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from typing import IO, Any

import numpy as np

from qsparse_moe.config.schema import DataConfig
from qsparse_moe.data.packing import Array
from qsparse_moe.errors import DataError

State = dict[str, Any]


class ProcessStream:
    """The parts of the text that a rank reads, read by a process that ``take`` starts.

    It has the methods of ``streaming.PartStreams``, and gives the same sequences and states.
    """

    def __init__(
        self, config: DataConfig, parts: range, *, num_parts: int, seed: int | None, begin: list[State]
    ) -> None:
        """Args: ``begin`` is the state of these parts of the text at their beginning; see ``Streams.train``."""
        self._parts = parts
        self._request = {
            "data": config.model_dump(mode="json"),
            "parts": [parts.start, parts.stop],
            "num_parts": num_parts,
            "seed": seed,
            # The process of a rank without a terminal has no log of its own.
            "level": logging.getLogger("qsparse_moe").getEffectiveLevel(),
        }
        self._state, self._passes = begin, [0] * len(config.sources)
        self._num_sequences = 0
        self._process: subprocess.Popen[bytes] | None = None

    def take(self, num_sequences: int) -> Array:
        """Return the token ids ``(num_sequences, S + 1)`` of the next sequences.

        Raises:
            DataError: the stream cannot be read, or the process was killed.
        """
        if self._process is None or num_sequences != self._num_sequences:
            self._start(num_sequences)
        assert self._process is not None and self._process.stdout is not None
        while line := self._process.stdout.readline():
            message = json.loads(line)
            if "log" in message:
                logging.getLogger(message["log"]).log(message["level"], "%s", message["text"])
            elif "error" in message:
                self.close()
                raise DataError(message["error"])
            else:
                return self._receive(message, self._process.stdout)
        code = self._process.wait()
        self.close()
        raise DataError(
            f"the process that reads parts {self._parts.start} to {self._parts.stop - 1} of the text has ended with "
            f"exit code {code}, and it must run as long as the run; if it was killed for want of memory, lower "
            "data.shuffle_window or data.max_document_bytes, or set data.reader=thread"
        )

    def _receive(self, message: dict[str, Any], stream: IO[bytes]) -> Array:
        dtype = np.dtype(message["dtype"])
        content = stream.read(dtype.itemsize * int(np.prod(message["shape"])))
        self._state, self._passes = message["state"], message["passes"]
        return np.frombuffer(content, dtype).reshape(message["shape"])

    def passes(self) -> list[int]:
        """Return how many passes over each source the process has ended after the last sequence returned."""
        return self._passes

    def state_dict(self) -> list[State]:
        """Return the position after the last sequence returned."""
        return self._state

    def load_state_dict(self, states: list[State]) -> None:
        """Continue each part after the sequence that was the last one when its state was saved."""
        self.close()
        self._state = states

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self, num_sequences: int) -> None:
        self.close()
        self._num_sequences = num_sequences
        # The same modules as here, also those that a script has put on its path; and no device, which is the rank's.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "qsparse_moe.data.reader_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        request = self._request | {"num_sequences": num_sequences, "state": self._state}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()


class _LogMessages(logging.Handler):
    """Sends the log to the rank, which knows where it goes."""

    def __init__(self, output: IO[bytes]) -> None:
        super().__init__()
        self._output = output

    def emit(self, record: logging.LogRecord) -> None:
        _send(self._output, {"log": record.name, "level": record.levelno, "text": record.getMessage()})


def _send(output: IO[bytes], message: dict[str, Any], content: bytes = b"") -> None:
    output.write(json.dumps(message).encode() + b"\n" + content)
    output.flush()


def _serve(request: dict[str, Any], output: IO[bytes]) -> None:
    """Send the sequences of step after step until the rank has gone or the stream fails."""
    # Imported here: it takes seconds, and the rank needs none of it from this module.
    from qsparse_moe.data.token_data import open_streams

    try:
        streams = open_streams(DataConfig.model_validate(request["data"]))
        stream = streams.train(range(*request["parts"]), num_parts=request["num_parts"], seed=request["seed"])
        stream.load_state_dict(request["state"])
        while True:
            tokens = stream.take(request["num_sequences"])
            facts = {"shape": tokens.shape, "dtype": tokens.dtype.str}
            _send(output, facts | {"state": stream.state_dict(), "passes": stream.passes()}, tokens.tobytes())
    except DataError as error:
        _send(output, {"error": str(error)})


def main() -> None:
    """Read the request from standard input, and serve it."""
    # Ctrl-C reaches the whole group of processes: the rank still needs the data of its step, and ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    output = os.fdopen(os.dup(1), "wb")
    # What a library prints must not come between the messages.
    os.dup2(2, 1)
    request = json.loads(sys.stdin.readline())
    logger = logging.getLogger("qsparse_moe")
    logger.setLevel(request["level"])
    logger.addHandler(_LogMessages(output))
    logger.propagate = False
    try:
        _serve(request, output)
    except BrokenPipeError:
        # The rank has gone. Without this, Python would try to flush once more at the end, and complain.
        os._exit(0)


if __name__ == "__main__":
    main()
