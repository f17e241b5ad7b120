# mypy: ignore-errors
"""Made `vllm-0.32.json`: block hashes by vLLM 0.32's own request, extra-key and hashing code.

Not needed to run the tests. Run it with a Python that has vLLM 0.32 and xxhash:

    PYTHONHASHSEED=7 python make_vllm_vectors.py > vllm-0.32.json

Every request crosses vLLM's own message encoding first, as from its HTTP process to its engine process: pickle, and so
`sha256` and `xxhash`, tells objects from values. Block size 16. `untagged` is what an event shows of the extra keys.
"""

import json
import os
import random

from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils as vllm_blocks
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.request import Request
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

BLOCK_SIZE = 16
IMAGE = "9f86d081884c7d659a2feaa0c55ad015"


def image(identifier, offset, length):
    return MultiModalFeatureSpec(
        data=None, modality="image", identifier=identifier, mm_position=PlaceholderRange(offset=offset, length=length)
    )


def lora(name, path):
    return LoRARequest(lora_name=name, lora_int_id=3, lora_path=path)


REQUESTS = {
    "plain": {},
    "salt": {"cache_salt": "tenant-ä"},
    "salt of one character": {"cache_salt": "x"},
    "salt like a tag": {"cache_salt": "cache_salt"},
    "lora": {"lora_request": lora("sql", "/adapters/sql")},
    "lora, name and path equal": {"lora_request": lora("org/sql", "org/sql"), "cache_salt": "org/sql"},
    "lora and path of one and the same character": {"lora_request": lora("m", "m"), "cache_salt": "m"},
    "lora and salt": {"lora_request": lora("sql", "/adapters/sql"), "cache_salt": "tenant-a"},
    "one image over several blocks": {"mm_features": [image(IMAGE, 5, 30)]},
    "two images in a block": {"mm_features": [image(IMAGE, 2, 4), image("ab" * 16, 8, 20)]},
    "the same image twice in a block": {"mm_features": [image(IMAGE, 2, 4), image(IMAGE, 8, 3)]},
    "everything": {
        "mm_features": [image(IMAGE, 2, 4), image(IMAGE, 8, 3), image("cd" * 16, 11, 300)],
        "lora_request": lora("sql", "/adapters/sql"),
        "cache_salt": "tenant-a",
    },
}


def in_engine(tokens, fields):
    request = EngineCoreRequest(
        request_id="r",
        prompt_token_ids=tokens,
        mm_features=fields.get("mm_features"),
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=fields.get("lora_request"),
        cache_salt=fields.get("cache_salt"),
        data_parallel_rank=None,
    )
    return MsgpackDecoder(EngineCoreRequest).decode(MsgpackEncoder().encode(request))


def vectors():
    rng = random.Random(0)
    for algorithm in ("sha256", "sha256_cbor", "xxhash", "xxhash_cbor"):
        hashing = get_hash_fn_by_name(algorithm)
        vllm_blocks.init_none_hash(hashing)
        for case, fields in REQUESTS.items():
            tops = (24, 256, 1 << 16, 150_000, 1 << 32) if case == "plain" else (1 << 16,)
            for top in tops:
                tokens = [rng.randrange(top) for _ in range(3 * BLOCK_SIZE)]
                hasher = vllm_blocks.get_request_block_hasher(BLOCK_SIZE, hashing)
                request = Request.from_engine_core_request(in_engine(tokens, fields), hasher)
                extra = [
                    vllm_blocks.generate_block_hash_extra_keys(request, start, start + BLOCK_SIZE, 0)[0]
                    for start in range(0, len(tokens), BLOCK_SIZE)
                ]
                adapter = fields.get("lora_request")
                yield {
                    "case": case,
                    "profile": f"{algorithm}/b{BLOCK_SIZE}/tagged/seed={os.environ['PYTHONHASHSEED']}",
                    "tokens": tokens,
                    "lora": adapter and [adapter.lora_name, adapter.lora_int_id, adapter.lora_path],
                    "cache_salt": fields.get("cache_salt"),
                    "multimodal": "mm_features" in fields,
                    "untagged": vllm_blocks.to_event_extra_keys(extra),
                    "hashes": [state.hex() for state in request.block_hashes],
                }


if __name__ == "__main__":
    print("[\n" + ",\n".join(json.dumps(v, ensure_ascii=False) for v in vectors()) + "\n]")
