# Triton's Python backend on a decoder of enginesmith: a language model with its cache. It needs enginesmith, NumPy and
# the engine's runtime, and stands in the folder of a model's version as model.py, with serve.json beside it.
#
# A request is a prompt. Its tokens are sent one by one, as they are made; requests that come and go share the calls of
# the engine. One whose client is gone, or asks for its end by another request, ends before its next token.

import json
import sys
import threading
from pathlib import Path

import triton_python_backend_utils as pb_utils

_WANTED = json.loads(Path(__file__).with_name("serve.json").read_text())
sys.path[:0] = _WANTED["path"]  # the interpreter within the server takes no notice of PYTHONPATH

import numpy as np  # noqa: E402

import enginesmith  # noqa: E402
from enginesmith.errors import EnginesmithError  # noqa: E402
from enginesmith.serving import hosted  # noqa: E402
from enginesmith.serving.counted import Counted  # noqa: E402
from enginesmith.serving.decoding import CANCEL, OPTIONS, PROMPT, TEXT, TOKEN, request_of  # noqa: E402

_LAST = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def initialize(self, args):
        self._engine = hosted.open_engine(args, _WANTED, json.loads(args["model_config"]))
        kept, policy = _WANTED["prefix_bytes"], _WANTED["evict"]
        self._draft = self._counts = self._counted = None
        if drafted := _WANTED["draft"]:
            self._draft = hosted.open_engine(args, drafted, json.loads(args["model_config"]))
            self._counts = enginesmith.Speculation()
            self._counted = Counted(pb_utils, args["model_name"], self._counts)
        self._batcher = self._engine.batcher(
            prefixes=enginesmith.Prefixes(kept) if kept else None,
            eviction=enginesmith.Eviction(policy) if policy else None,
            draft=self._draft,
            speculation=self._counts,
        )
        self._left = threading.Semaphore(0)
        self._begun = 0
        self._named = {}

    def execute(self, requests):
        for request in requests:
            said = json.loads(request.parameters() or "{}")
            if name := said.get(CANCEL):
                self._cancel(request.get_response_sender(), name)
            else:
                self._begun += 1
                self._begin(request.get_response_sender(), request, said.get(TEXT))

    def finalize(self):
        for _ in range(self._begun):
            self._left.acquire()
        self._batcher.close()
        self._engine.close()
        if self._draft is not None:
            self._draft.close()

    def _cancel(self, sender, name):
        if text := self._named.get(name):
            text.cancel()
            sender.send(flags=_LAST)
        else:
            self._refuse(sender, "there is no such text here")

    def _refuse(self, sender, why):
        sender.send(pb_utils.InferenceResponse([], pb_utils.TritonError(why)), flags=_LAST)

    def _begin(self, sender, request, name):
        given = {PROMPT: self._read(request, PROMPT)}
        given.update((name, self._read(request, name)) for name in OPTIONS)
        text = None

        def take(token):
            if sender.is_cancelled():
                text.cancel()
            else:
                sender.send(pb_utils.InferenceResponse([hosted.tensor(pb_utils, TOKEN, np.array([token], np.int64))]))

        def done(error):
            self._named.pop(name, None)
            try:
                if self._counted is not None:
                    self._counted()
                if error is not None:
                    self._refuse(sender, str(error))
                else:
                    sender.send(flags=_LAST)
            finally:
                self._left.release()

        try:
            text = request_of(
                {n: array for n, array in given.items() if array is not None}, _WANTED["stop"], take, done
            )
            if name:
                self._named[name] = text
            self._batcher.submit(text)
        except EnginesmithError as error:
            done(error)

    def _read(self, request, name):
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        return None if tensor is None else hosted.read(tensor)
