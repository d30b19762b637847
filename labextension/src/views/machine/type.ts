/** How wide a text will be, without a page to ask: enough to wrap and to cut it. */

/** Width in pixels at this size; a little more than most fonts need. */
export function textWidth(text: string, size = 12): number {
  let ems = 0
  for (const character of text) ems += emsOf(character)
  return ems * size
}

/** The text, or its beginning and `…` where there is no room for it. */
export function cut(text: string, room: number, size = 12): string {
  if (textWidth(text, size) <= room) return text
  const characters = [...text]
  while (characters.length && textWidth(`${characters.join('')}…`, size) > room) characters.pop()
  return `${characters.join('').trimEnd()}…`
}

function emsOf(character: string): number {
  const code = character.codePointAt(0) ?? 0
  if (code > 0x2e7f) return 1
  if ('ijlI.,:;|\'!()[] ·'.includes(character)) return 0.34
  if ('mwMW→↔≈%'.includes(character)) return 0.9
  return code >= 65 && code <= 90 ? 0.68 : 0.58
}
