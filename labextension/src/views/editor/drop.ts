/** What a drag means: which blocks go along, what the ghost says, where they may be dropped. */

import type { Translate } from '../../i18n'
import { formatBytes } from '../../units'
import type { DragHooks } from './drag'
import type { Editor } from './editor'
import { selectedWords } from './panel'
import type { Tiers } from '../map/tiers'
import { deviceTitle } from '../map/words'

/** `chosen` is called when a drag chose its block. */
export function dropHooks(t: Translate, editor: Editor, tiers: Tiers, chosen: () => void): DragHooks {
  return {
    canDrag: () => editor.canEdit,
    begin(label) {
      if (!editor.selection.has(label)) editor.selection.only(label)
      chosen()
      markTargets(editor, tiers, '')
    },
    aim(device) {
      const isTarget = canHold(editor, device)
      markTargets(editor, tiers, isTarget ? device : '')
      const words = selectedWords(t, editor)
      if (!isTarget) return { lines: [words], isTarget }
      return { lines: [`${words} → ${deviceTitle(t, device)}`, ...roomAfter(t, editor, device)], isTarget }
    },
    drop: device => editor.move(editor.selection.labels, device),
    end() {
      for (const { element } of tiers.rows) element.classList.remove('target', 'aimed')
    },
  }
}

function canHold(editor: Editor, device: string): boolean {
  return editor.plan.tiers.some(tier => tier.device === device && tier.can_hold)
}

function markTargets(editor: Editor, tiers: Tiers, aimed: string): void {
  for (const { device, element } of tiers.rows) {
    element.classList.toggle('target', canHold(editor, device))
    element.classList.toggle('aimed', device === aimed)
  }
}

/** How much a tier would have left with the selection: an estimate, before Python says it. */
function roomAfter(t: Translate, editor: Editor, device: string): string[] {
  const { plan } = editor
  const tier = plan.tiers.find(other => other.device === device)
  if (!tier || tier.kind === 'disk') return []
  const movers = editor.movers(editor.selection.labels)
  const moving = plan.blocks.filter(block => block.home !== device && movers.has(block.label))
  const left = moving.reduce((room, block) => room - block.bytes, tier.spare)
  return [t(left < 0 ? 'mapLacks' : 'mapToSpare', { size: formatBytes(Math.abs(left)) })]
}
