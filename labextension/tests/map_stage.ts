/** A map on a stage: a small plan with bytes that are easy to add up, and a kernel that only listens. */

import { translator, type Language } from '../src/i18n'
import { makeHost } from '../src/mount'
import { mapView } from '../src/views/map/view'
import type { Command, Event, MapState, PlanState, Propose } from '../src/wire'
import states from './states.json'

const GIB = 1024 ** 3

/** A state of a real plan, by name. */
export function realState(name: 'streamed' | 'halved' | 'refused' | 'experts' | 'split'): MapState {
  return structuredClone(states[name]) as unknown as MapState
}

/** GPU of 8 GiB, RAM of 16 GiB; 8 layers of 1 GiB (4 on the GPU, 3 in RAM, 1 on disk), head tied to embed. */
export function smallState(change: Partial<MapState> = {}): MapState {
  const state = realState('streamed')
  const [gpu, ram, disk] = state.plan.tiers
  const [embed, layer] = state.plan.blocks
  if (!gpu || !ram || !disk || !embed || !layer) throw new Error('states.json lacks what tests need')
  const home = (i: number) => (i < 4 ? 'cuda:0' : i < 7 ? 'cpu' : 'disk')
  const ways = { 'cuda:0': 'resident', cpu: 'streamed', disk: 'read' } as const
  const blocks = [
    { ...embed, bytes: GIB / 2, home: 'cuda:0', way: 'resident' as const, tied_to: ['head'], looks_up: false },
    ...Array.from({ length: 8 }, (_, i) => ({
      ...layer, label: `layers.${i}`, bytes: GIB, home: home(i), compute: 'cuda:0', way: ways[home(i)], cache_bytes: GIB / 16,
    })),
    { ...embed, label: 'head', kind: 'head', bytes: 0, home: 'cuda:0', way: 'resident' as const, tied_to: ['embed'], looks_up: false },
  ]
  const none = { slots: 0, kv_cache: 0, activations: 0, reserve: 0, other: 0, is_limited: false, now: {} }
  state.plan = {
    ...state.plan, blocks, bytes: 8.5 * GIB, decode_tps: 0.5, prefill_tps: 260, warnings: ['1 block of 1.0 GiB on disk.'],
    tiers: [
      // 4.5 weights + 0.5 slots + 1 cache = 6 planned; 1.5 free + 0.5 others: 8.
      { ...gpu, ...none, total: 8 * GIB, weights: 4.5 * GIB, slots: GIB / 2, kv_cache: GIB, planned: 6 * GIB, limit: 7.5 * GIB, spare: 1.5 * GIB, other: GIB / 2 },
      { ...ram, ...none, total: 16 * GIB, weights: 3 * GIB, planned: 3 * GIB, limit: 8 * GIB, spare: 5 * GIB, is_limited: true },
      { ...disk, ...none, weights: GIB, planned: GIB, is_whole: false },
    ],
    moves: [
      { source: 'cpu', target: 'cuda:0', bytes: 3 * GIB, bytes_per_s: 25e9 },
      { source: 'disk', target: 'cuda:0', bytes: GIB, bytes_per_s: 6e9 },
    ],
  }
  return { ...state, ...change }
}

/** The small plan with another placement in force: `layers.3` in RAM. */
export function otherState(): MapState {
  const state = smallState()
  const block = state.plan.blocks.find(one => one.label === 'layers.3')
  Object.assign(block ?? {}, { home: 'cpu', way: 'streamed' })
  return state
}

/** The small plan with a head of its own, and `embed` as a table whose rows are looked up in these homes, one part in each. */
export function lookedUpState(...homes: ('cpu' | 'disk')[]): MapState {
  const state = smallState()
  const [embed, ...others] = state.plan.blocks
  const head = others.pop()
  if (!embed || !head) throw new Error('a small plan has both')
  const tables = homes.map((home, i) => ({
    ...embed, label: i ? `embed_${i}` : 'embed', home, way: 'looked-up' as const, tied_to: [], looks_up: true,
  }))
  state.plan.blocks = [...tables, ...others, { ...head, bytes: GIB / 2, tied_to: [] }]
  return state
}

/** A pointer event as a browser sends it; jsdom has no layout, so what is under it is its target. */
export function point(target: Element, type: string, x: number, y: number, values: PointerEventInit = {}): void {
  target.dispatchEvent(new PointerEvent(type, {
    bubbles: true, composed: true, cancelable: true, clientX: x, clientY: y, pointerId: 1, button: 0, ...values,
  }))
}

export class Stage {
  readonly sent: Command[] = []
  readonly root: HTMLElement
  readonly shown

  constructor(public state: MapState, language: Language = 'en') {
    const { host, root } = makeHost()
    document.body.replaceChildren(host)
    this.root = root
    this.shown = mapView(state, {
      root, view: 'a1', language, t: translator(language), send: command => void this.sent.push(command),
    })
  }

  get text(): string {
    return this.root.querySelector('.map')?.textContent ?? ''
  }

  one(selector: string): HTMLElement {
    const found = this.root.querySelector<HTMLElement>(selector)
    if (!found) throw new Error(`nothing is ${selector}`)
    return found
  }

  all(selector: string): HTMLElement[] {
    return [...this.root.querySelectorAll<HTMLElement>(selector)]
  }

  tier(device: string): HTMLElement {
    return this.one(`.tier[data-device="${device}"]`)
  }

  /** A block in the bar of its tier. */
  block(label: string): HTMLElement {
    return this.one(`.tiers [data-label="${label}"]`)
  }

  /** A block in model order. */
  cell(label: string): HTMLElement {
    return this.one(`.strip [data-label="${label}"]`)
  }

  labelsIn(device: string): string[] {
    return [...this.tier(device).querySelectorAll('[role="option"]')].map(option => option.getAttribute('data-label') ?? '')
  }

  selected(): string[] {
    return this.all('.strip [aria-selected="true"]').map(option => option.getAttribute('data-label') ?? '')
  }

  button(name: string): HTMLButtonElement {
    const found = this.all('button').find(button => button.textContent?.includes(name))
    if (!found) throw new Error(`no button says ${name}`)
    return found as HTMLButtonElement
  }

  key(element: Element, key: string, modifiers: KeyboardEventInit = {}): KeyboardEvent {
    const event = new KeyboardEvent('keydown', { key, bubbles: true, composed: true, cancelable: true, ...modifiers })
    element.dispatchEvent(event)
    return event
  }

  click(element: Element, modifiers: MouseEventInit = {}): void {
    element.dispatchEvent(new MouseEvent('click', { bubbles: true, composed: true, ...modifiers }))
  }

  /** The focused element of the view. */
  get focused(): Element | null {
    return (this.root.getRootNode() as ShadowRoot).activeElement
  }

  event(event: Record<string, unknown>): void {
    this.shown.event({ view: 'a1', ...event } as unknown as Event)
  }

  get proposals(): Propose[] {
    return this.sent.filter(command => command.type === 'propose')
  }

  /** Python's answer to the newest proposal, or to another. */
  answer(change: Partial<PlanState> = {}, values: { seq?: number; changed?: number; moved_bytes?: number } = {}): void {
    const last = this.proposals[this.proposals.length - 1]
    const homes = last?.placement.homes ?? {}
    const blocks = this.state.plan.blocks.map(block => ({ ...block, home: homes[block.label] ?? block.home }))
    this.event({
      type: 'proposal', seq: last?.seq ?? 0, changed: 1, moved_bytes: GIB,
      plan: { ...this.state.plan, blocks, ...change }, ...values,
    })
  }
}
