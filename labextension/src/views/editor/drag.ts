/** Blocks that are dragged to another tier, by mouse, pen or finger, with a ghost that says what and where. */

import { h, replace } from '../../dom'

const THRESHOLD = 5 // pixels before a press becomes a drag

export interface DragHooks {
  /** Whether a drag may begin at all. */
  canDrag: () => boolean
  /** A drag of this block begins: choose what goes along. */
  begin: (label: string) => void
  /** What the ghost says over a device (empty: over none), and whether blocks may be dropped there. */
  aim: (device: string) => { lines: string[]; isTarget: boolean }
  drop: (device: string) => void
  /** The drag is over, dropped or not. */
  end: () => void
}

export interface Drag {
  ghost: HTMLElement
  /** Whether the click that follows belongs to a drag; asked once. */
  swallowsClick: () => boolean
  cancel: () => void
}

interface Press {
  id: number
  x: number
  y: number
  label: string
  isDragging: boolean
  device: string
}

/** Listen for drags in `frame`; `frame` is what the ghost's place is counted from. */
export function makeDrag(frame: HTMLElement, hooks: DragHooks): Drag {
  const ghost = h('div', { class: 'ghost', hidden: true, 'aria-hidden': 'true' })
  let press: Press | null = null
  let wasDragged = false

  const listen = (isOn: boolean) => {
    const change = isOn ? document.addEventListener : document.removeEventListener
    change.call(document, 'pointermove', move as EventListener, true)
    change.call(document, 'pointerup', up as EventListener, true)
    change.call(document, 'pointercancel', cancel, true)
    change.call(document, 'keydown', key as EventListener, true)
  }
  const down = (event: PointerEvent) => {
    wasDragged = false
    const label = labelOf(event)
    if (label === null || event.button > 0 || !hooks.canDrag()) return
    cancel()
    press = { id: event.pointerId, x: event.clientX, y: event.clientY, label, isDragging: false, device: '' }
    listen(true)
  }
  const move = (event: PointerEvent) => {
    if (!press || event.pointerId !== press.id) return
    if (!press.isDragging && Math.hypot(event.clientX - press.x, event.clientY - press.y) < THRESHOLD) return
    if (!press.isDragging) start(press)
    event.preventDefault()
    const device = deviceAt(frame, event)
    const { lines, isTarget } = hooks.aim(device)
    press.device = isTarget ? device : ''
    ghost.classList.toggle('can-drop', isTarget)
    replace(ghost, ...lines.map((line, i) => h(i ? 'div' : 'b', {}, line)))
    follow(ghost, frame, event)
  }
  const start = (begun: Press) => {
    begun.isDragging = true
    wasDragged = true
    frame.classList.add('is-dragging')
    ghost.hidden = false
    hooks.begin(begun.label)
  }
  const up = (event: PointerEvent) => {
    if (!press || event.pointerId !== press.id) return
    const { isDragging, device } = press
    stop()
    if (isDragging && device) hooks.drop(device)
  }
  const key = (event: KeyboardEvent) => {
    if (event.key !== 'Escape' || !press?.isDragging) return
    event.preventDefault()
    event.stopPropagation()
    cancel()
  }
  const cancel = () => {
    if (press) stop()
  }
  const stop = () => {
    const isDragging = press?.isDragging ?? false
    press = null
    listen(false)
    ghost.hidden = true
    frame.classList.remove('is-dragging')
    if (isDragging) hooks.end()
  }
  frame.addEventListener('pointerdown', down as EventListener)
  return {
    ghost,
    cancel,
    swallowsClick() {
      const was = wasDragged
      wasDragged = false
      return was
    },
  }
}

function labelOf(event: Event): string | null {
  const option = event.target instanceof Element ? event.target.closest('[role="option"]') : null
  return option?.getAttribute('data-label') ?? null
}

/** The device of the tier under a pointer; a finger's events go on to come from where it went down. */
function deviceAt(frame: HTMLElement, event: PointerEvent): string {
  const tree = frame.getRootNode() as Document | ShadowRoot
  // jsdom has no layout, and no such method.
  const under = typeof tree.elementFromPoint === 'function'
    ? tree.elementFromPoint(event.clientX, event.clientY)
    : event.composedPath()[0]
  const tier = under instanceof Element ? under.closest('[data-device]') : null
  return tier && frame.contains(tier) ? (tier.getAttribute('data-device') ?? '') : ''
}

function follow(ghost: HTMLElement, frame: HTMLElement, event: PointerEvent): void {
  const outer = frame.getBoundingClientRect()
  const x = Math.min(event.clientX - outer.left + 14, outer.width - ghost.offsetWidth - 4)
  ghost.style.left = `${Math.max(0, x).toFixed(1)}px`
  ghost.style.top = `${(event.clientY - outer.top + 16).toFixed(1)}px`
}
