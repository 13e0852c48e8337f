"""The streams of the subscription service: few, and what their namespaces say."""

from trunkline.shared.subjects import Subjects
from trunkline.subscriptions.declared import SPARE_ENTRIES, declared_streams
from trunkline.subscriptions.namespace import EPHEMERAL, Namespace


def test_there_is_one_stream_for_each_class_of_namespaces_that_keep_something() -> None:
    namespaces = [Namespace(5, 60.0), EPHEMERAL, Namespace(5, 60.0), Namespace(5, 60.0, 3, "memory")]
    claims, file, memory = declared_streams(Subjects("eu.chat"), namespaces, 3, first_sequence=1_700_000_000_000)
    assert (claims.name, claims.replicas, claims.first_sequence) == ("KV_eu_chat_claims", 3, 1_700_000_000_000)
    assert (file.name, file.subjects) == ("eu_chat_LOG_h5_t60_r1", ["eu.chat.log.h5_t60_r1.>"])
    assert (file.storage, file.replicas, file.max_age_s) == ("file", 1, 60.0)
    assert file.max_messages_per_subject == 5 + SPARE_ENTRIES
    assert (memory.name, memory.storage, memory.replicas) == ("eu_chat_LOG_h5_t60_r3_memory", "memory", 3)


def test_no_two_of_them_capture_the_same_subjects() -> None:
    namespaces = [Namespace(5, 60.0, 1, "memory"), Namespace(5, 60.0), Namespace(50, 60.0), Namespace(5, 6.0)]
    streams = declared_streams(Subjects(), namespaces, 1, first_sequence=1)
    assert len({each.name for each in streams}) == len({subject for each in streams for subject in each.subjects}) == 5
