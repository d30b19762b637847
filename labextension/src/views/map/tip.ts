/** The tooltip of the map: an element of our own over the cell that is pointed at or focused. */

import { h, replace } from '../../dom'

const GAP = 8
const MARGIN = 4

export interface Tip {
  element: HTMLElement
  readonly isShown: boolean
  /** Say these lines over an element, the first as its name. */
  show: (over: Element, lines: string[]) => void
  hide: () => void
}

export function makeTip(frame: HTMLElement): Tip {
  const element = h('div', { class: 'tip', role: 'tooltip', hidden: true })
  return {
    element,
    get isShown() {
      return !element.hidden
    },
    show(over, lines) {
      const [name = '', ...rest] = lines
      replace(element, h('b', {}, name), ...rest.map(line => h('div', {}, line)))
      element.hidden = false
      place(element, frame, over)
    },
    hide() {
      element.hidden = true
    },
  }
}

/** Above the cell, or below where there is no room; never out of the frame at a side. */
function place(tip: HTMLElement, frame: HTMLElement, over: Element): void {
  const outer = frame.getBoundingClientRect()
  const cell = over.getBoundingClientRect()
  const size = tip.getBoundingClientRect()
  const middle = cell.left + cell.width / 2 - outer.left - size.width / 2
  const left = Math.max(MARGIN, Math.min(middle, outer.width - size.width - MARGIN))
  const above = cell.top - outer.top - size.height - GAP
  tip.style.left = `${left.toFixed(1)}px`
  tip.style.top = `${(above >= 0 ? above : cell.bottom - outer.top + GAP).toFixed(1)}px`
}
