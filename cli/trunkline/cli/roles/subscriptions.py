"""`trunkline subscriptions`."""

import typer

from trunkline.cli.options import with_settings
from trunkline.cli.roles.run import run_role
from trunkline.subscriptions.service import SubscriptionService
from trunkline.subscriptions.settings import SubscriptionSettings

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False, rich_markup_mode="markdown")


@app.command(epilog="Example: **trunkline subscriptions --nats-url nats://nats:4222**")
@with_settings(SubscriptionSettings)
def subscriptions(settings: SubscriptionSettings) -> None:
    """Run the subscription service: it owns the topics, gives each publication its offset and sends it to the
    edges.

    Any number of instances share the topics. When one goes, the others take over its share.
    """
    run_role(lambda: SubscriptionService(settings), settings)
