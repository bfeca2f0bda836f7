"""Every sentence that a person reads, in English and Spanish, side by side.

Proof: tests/test_terminal.py (both languages say the same things, of the same values).
"""

from collections.abc import Mapping

LANGUAGES = ("en", "es")

TEXTS: dict[str, tuple[str, str]] = {
    # the conversation
    "loading": ("loading {model} …", "cargando {model} …"),
    "greeting": (
        "{model} · engine {engine} · context of {context} tokens",
        "{model} · motor {engine} · contexto de {context} tokens",
    ),
    "greeting_small": (
        "A small model that runs on this computer: what it says may be wrong.",
        "Un modelo pequeño que corre en este ordenador: lo que dice puede estar mal.",
    ),
    "greeting_help": (
        "/help lists the commands, Ctrl-C stops a reply, Ctrl-D leaves.",
        "/help muestra las órdenes, Ctrl-C para una respuesta, Ctrl-D sale.",
    ),
    "footer_first": ("{seconds} s to first token", "primer token en {seconds} s"),
    "footer_prefill": ("prefill {speed} tokens/s", "lectura {speed} tokens/s"),
    "footer_decode": ("decode {speed} tokens/s", "escritura {speed} tokens/s"),
    "footer_context": ("context {used}/{maximum}", "contexto {used}/{maximum}"),
    "footer_reused": ("{reused} from the cache", "{reused} de la caché"),
    "left": (
        "{left} earlier turns no longer fit the context: the model does not see them any more",
        "{left} turnos anteriores ya no caben en el contexto: el modelo deja de verlos",
    ),
    "left_one": (
        "the oldest turn no longer fits the context: the model does not see it any more",
        "el turno más antiguo ya no cabe en el contexto: el modelo deja de verlo",
    ),
    "stopped": ("stopped; what came is kept", "parada; lo que llegó se conserva"),
    "cut": (
        "cut after {tokens} tokens (/set max_new_tokens N allows more)",
        "cortada tras {tokens} tokens (/set max_new_tokens N permite más)",
    ),
    "cut_context": (
        "cut: the context of {maximum} tokens is full",
        "cortada: el contexto de {maximum} tokens está lleno",
    ),
    "no_words": ("the model answered nothing", "el modelo no respondió nada"),
    "same_again": (
        "the same reply will come: the temperature is 0, or a seed is set",
        "saldrá la misma respuesta: la temperatura es 0, o hay una semilla fija",
    ),
    "press_again": ("Ctrl-C once more leaves", "otro Ctrl-C para salir"),
    "bye": ("Bye.", "Hasta luego."),
    "you": ("You", "Tú"),
    "system": ("System", "Sistema"),
    "conversation": ("Conversation with {model}", "Conversación con {model}"),
    # commands: what they want, what they do, what they answer
    "help_help": ("", "", ),
    "yes": ("yes", "sí"),
}
