/** A line that assistive technology reads aloud: at most one change a second, the newest wins. */

import { h, setText } from '../../dom'

const PAUSE_MS = 1000

export interface Polite {
  element: HTMLElement
  /** `isUrgent` does not wait. */
  say: (text: string, isUrgent?: boolean) => void
  cleanup: () => void
}

export function makePolite(): Polite {
  const element = h('div', { class: 'status', role: 'status' })
  let waiting: ReturnType<typeof setTimeout> | undefined
  let next: string | null = null
  const rest = () => {
    waiting = undefined
    if (next !== null) speak(next)
  }
  const speak = (text: string) => {
    next = null
    if (element.textContent === text) return
    clearTimeout(waiting)
    setText(element, text)
    waiting = setTimeout(rest, PAUSE_MS)
  }
  return {
    element,
    say(text, isUrgent = false) {
      if (!text) {
        // Silence is not read aloud, and an old sentence beside new numbers would be wrong.
        next = null
        setText(element, '')
      } else if (waiting === undefined || isUrgent) speak(text)
      else next = text
    },
    cleanup: () => clearTimeout(waiting),
  }
}
