"""Messages to a person who does not watch: any address that Apprise knows (https://github.com/caronc/apprise)."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

from trainkit.errors import UserError


class Notifier:
    """Sends behind the run's back; an address that fails is said once, and never stops a run.

    Raises:
        UserError: apprise is not installed, or does not know an address.
    """

    def __init__(self, urls: Sequence[str], run: str, note: Callable[[str], None]) -> None:
        self._run, self._note, self._failed = run, note, False
        self._sending: list[threading.Thread] = []
        self._to: Any = None
        if urls:
            self._to = _apprise().Apprise()
            for url in urls:
                if not self._to.add(url):
                    raise UserError(f"notify={url.split('://')[0]}://... is no address that apprise knows")

    def tell(self, text: str) -> None:
        """Send `text`, and return at once."""
        if self._to is not None:
            thread = threading.Thread(target=self._send, args=(text,), daemon=True)
            self._sending = [t for t in self._sending if t.is_alive()] + [thread]
            thread.start()

    def close(self, timeout_s: float = 10.0) -> None:
        """Wait a little for what is being sent."""
        for thread in self._sending:
            thread.join(timeout_s)

    def _send(self, text: str) -> None:
        try:
            sent = self._to.notify(title=f"trainkit: {self._run}", body=text)
        except Exception as error:  # whatever a service's plugin raises, the run is worth more
            sent, text = False, f"{type(error).__name__}: {error}"
        if not sent and not self._failed:
            self._failed = True
            self._note(f"warning: a notification could not be sent ({text}); others may fail silently")


def _apprise() -> Any:
    try:
        import apprise
    except ImportError as error:
        raise UserError("notify= needs the package apprise: pip install 'trainkit[notify]'") from error
    return apprise
