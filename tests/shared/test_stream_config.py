"""What is declared in the server's words, and how what it has differs."""

from trunkline.shared.stream_config import Consumer, Drift, Stream, differences


def test_a_stream_in_the_words_of_the_server() -> None:
    config = Stream(name="EVENTS", subjects=["event.>"], max_age_s=60.0, when_full="new", duplicates_s=120.0).config()
    assert (config["max_age"], config["max_bytes"], config["discard"]) == (60_000_000_000, -1, "new")
    assert config["duplicate_window"] == config["max_age"]  # the server refuses a longer one
    assert "allow_msg_schedules" not in config
    assert Stream(name="LATER", subjects=["later.>"], schedules=True).config()["allow_msg_schedules"]


def test_settings_that_are_off_and_left_out_are_no_difference() -> None:
    wanted = {"max_bytes": 10, "allow_direct": False, "replicas": 3}
    assert differences(wanted, {"max_bytes": 10, "replicas": 1, "description": "an operator's"}) == {"replicas": (1, 3)}
    assert differences(wanted, {"max_bytes": 10, "allow_direct": True, "replicas": 3}) == {"allow_direct": (True, False)}


def test_a_drift_says_what_it_is() -> None:
    full_name = Consumer(stream="EVENTS", name="chat").full_name
    assert str(Drift(full_name, missing=True)) == "EVENTS/chat: was missing"
    assert str(Drift("LOG", changes={"replicas": (1, 3)})) == "LOG: replicas was 1, not 3"
    assert str(Drift("LOG", changes={"storage": ("file", "memory")}, refused="no")) == "LOG: no"
