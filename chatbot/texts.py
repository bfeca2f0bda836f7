"""Every sentence that a person reads, in English and Spanish, side by side.

Proof: tests/test_conversation.py (both languages speak of the same values).
"""

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
    "interrupt": ("Ctrl-C again, or Ctrl-D, leaves.", "Ctrl-C otra vez, o Ctrl-D, sale."),
    "footer_first": ("first token {seconds} s", "primer token {seconds} s"),
    "footer_prefill": ("prefill {speed}/s", "lee {speed}/s"),
    "footer_decode": ("decode {speed}/s", "escribe {speed}/s"),
    "footer_context": ("context {used}/{maximum}", "contexto {used}/{maximum}"),
    "footer_reused": ("{reused} cached", "{reused} en caché"),
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
    "cut_once": (
        "cut after {tokens} tokens (--max-new-tokens N allows more)",
        "cortada tras {tokens} tokens (--max-new-tokens N permite más)",
    ),
    "cut_context": (
        "cut: the context of {maximum} tokens is full",
        "cortada: el contexto de {maximum} tokens está lleno",
    ),
    "no_words": ("the model answered nothing", "el modelo no respondió nada"),
    "bye": ("Bye.", "Hasta luego."),
    "you": ("You", "Tú"),
    "system": ("System", "Sistema"),
    "conversation": ("Conversation with {model}", "Conversación con {model}"),
    # commands: their help
    "help_help": ("/help                 this list", "/help                 esta lista"),
    "help_system": (
        "/system [TEXT|off]    show, replace or remove the system prompt",
        "/system [TEXTO|off]   muestra, cambia o quita el mensaje de sistema",
    ),
    "help_set": (
        "/set [NAME VALUE]     show or change how replies are drawn",
        "/set [NOMBRE VALOR]   muestra o cambia cómo se sortean las respuestas",
    ),
    "help_seed": (
        "/seed [N|off]         the same seed gives the same reply",
        "/seed [N|off]         la misma semilla da la misma respuesta",
    ),
    "help_clear": (
        "/clear                begin a new conversation",
        "/clear                empieza otra conversación",
    ),
    "help_undo": (
        "/undo                 take back the last turn",
        "/undo                 deshace el último turno",
    ),
    "help_regen": (
        "/regen                another reply to the last message",
        "/regen                otra respuesta al último mensaje",
    ),
    "help_save": (
        "/save FILE            keep the conversation (JSON)",
        "/save ARCHIVO         guarda la conversación (JSON)",
    ),
    "help_load": (
        "/load FILE            go on with a kept conversation",
        "/load ARCHIVO         sigue una conversación guardada",
    ),
    "help_export": (
        "/export FILE          write it as Markdown",
        "/export ARCHIVO       la escribe en Markdown",
    ),
    "help_tokens": (
        "/tokens TEXT          how a text is cut into tokens",
        "/tokens TEXTO         cómo se corta un texto en tokens",
    ),
    "help_context": (
        "/context              what each turn costs in tokens, and which are read",
        "/context              cuántos tokens cuesta cada turno, y cuáles se leen",
    ),
    "help_stats": (
        "/stats                the last reply in numbers",
        "/stats                la última respuesta en números",
    ),
    "help_exit": (
        "/exit                 leave (or Ctrl-D)",
        "/exit                 salir (o Ctrl-D)",
    ),
    "help_more": (
        '"""                   begins and ends a message of several lines; // is a slash',
        '"""                   abre y cierra un mensaje de varias líneas; // es una barra',
    ),
    # commands: what they answer
    "same_again": (
        "the same reply, as set: /set temperature 0.8 and /seed off draw another each time",
        "la misma, como está puesto: /set temperature 0.8 y /seed off sortean otra cada vez",
    ),
    "cleared": ("A new conversation.", "Conversación nueva."),
    "undone": ("Taken back: {text}", "Deshecho: {text}"),
    "system_is": ("System prompt: {text}", "Mensaje de sistema: {text}"),
    "system_none": ("There is no system prompt.", "No hay mensaje de sistema."),
    "saved": ("Saved to {path}.", "Guardado en {path}."),
    "loaded": ("Loaded {turns} turns from {path}.", "Cargados {turns} turnos de {path}."),
    "tokens": (
        "{tokens} tokens, {characters} characters",
        "{tokens} tokens, {characters} caracteres",
    ),
    "context_turn": (
        "turn {number}: {tokens} tokens{state}",
        "turno {number}: {tokens} tokens{state}",
    ),
    "context_left": (" (no longer read)", " (ya no se lee)"),
    "context_system": ("system prompt: {tokens} tokens", "mensaje de sistema: {tokens} tokens"),
    "context_sum": (
        "{used} of {maximum} tokens used, {room} kept free for a reply",
        "{used} de {maximum} tokens en uso, {room} reservados para la respuesta",
    ),
    "no_stats": ("No reply yet.", "Aún no hay respuesta."),
    "stats_prompt": (
        "prompt: {tokens} tokens, {reused} of them from the cache",
        "entrada: {tokens} tokens, {reused} de ellos de la caché",
    ),
    "stats_first": (
        "first token after {seconds} s: prefill {speed} tokens/s",
        "primer token a los {seconds} s: lectura a {speed} tokens/s",
    ),
    "stats_reply": (
        "reply: {tokens} tokens, decode {speed} tokens/s",
        "respuesta: {tokens} tokens, escritura a {speed} tokens/s",
    ),
    # errors
    "unknown_command": (
        "unknown command {name}: /help lists them, // begins a message with a slash",
        "orden desconocida {name}: /help las muestra, // empieza un mensaje con barra",
    ),
    "wants": ("{name} wants {what}", "{name} necesita {what}"),
    "unknown_setting": (
        "unknown setting {name}: choose from {names}",
        "ajuste desconocido {name}: elige entre {names}",
    ),
    "rule_from_zero": (
        "{name} must be a number of 0 or more, got {got}",
        "{name} debe ser un número de 0 o más, y es {got}",
    ),
    "rule_count_or_off": (
        "{name} must be a whole number of 0 (off) or more, got {got}",
        "{name} debe ser un entero de 0 (apagado) o más, y es {got}",
    ),
    "rule_above_zero_to_one": (
        "{name} must be in (0, 1], got {got}",
        "{name} debe estar en (0, 1], y es {got}",
    ),
    "rule_zero_to_one": (
        "{name} must be in [0, 1], got {got}",
        "{name} debe estar en [0, 1], y es {got}",
    ),
    "rule_above_zero": (
        "{name} must be a number above 0, got {got}",
        "{name} debe ser un número mayor que 0, y es {got}",
    ),
    "rule_count": (
        "{name} must be a whole number of at least 1, got {got}",
        "{name} debe ser un entero de 1 o más, y es {got}",
    ),
    "rule_seed": (
        "{name} must be a whole number from 0 to 2**63 - 1, or off, got {got}",
        "{name} debe ser un entero de 0 a 2**63 - 1, u off, y es {got}",
    ),
    "empty_message": (
        "the message is empty: write something",
        "el mensaje está vacío: escribe algo",
    ),
    "not_unicode": (
        "the text is not valid UTF-8 (at character {place}): save or send it as UTF-8",
        "el texto no es UTF-8 válido (en el carácter {place}): guárdalo o envíalo como UTF-8",
    ),
    "message_too_long": (
        "the message has {needed} tokens, but {available} fit: shorten it",
        "el mensaje tiene {needed} tokens, pero caben {available}: acórtalo",
    ),
    "system_too_long": (
        "the system prompt has {needed} tokens, but {available} fit: shorten it",
        "el mensaje de sistema tiene {needed} tokens, pero caben {available}: acórtalo",
    ),
    "no_turn": ("there is no turn yet", "todavía no hay ningún turno"),
    "not_a_conversation": (
        "{path} is not a saved conversation: {why}",
        "{path} no es una conversación guardada: {why}",
    ),
    "not_replaced": (
        "{path} exists and cannot be read as a saved conversation: choose another name",
        "{path} existe y no se puede leer como conversación guardada: elige otro nombre",
    ),
    "page_not_replaced": (
        "{path} exists and is no exported conversation: choose another name",
        "{path} existe y no es una conversación exportada: elige otro nombre",
    ),
    "no_output": (
        "standard output is closed: send it to a terminal, a file or a pipe",
        "la salida estándar está cerrada: envíala a una terminal, un archivo o una tubería",
    ),
    "file_failed": ("{path}: {why}", "{path}: {why}"),
}


def say(language: str, key: str, **values: object) -> str:
    """The sentence of that key in that language, filled in.

    >>> say("es", "saved", path="a.json")
    'Guardado en a.json.'
    """
    return TEXTS[key][LANGUAGES.index(language)].format(**values)


class ChatError(ValueError):
    """What a person did that cannot be done; says so in either language."""

    def __init__(self, key: str, **values: object):
        super().__init__(say("en", key, **values))
        self.key = key
        self.values = values

    def text(self, language: str) -> str:
        """The sentence in that language."""
        return say(language, self.key, **self.values)
